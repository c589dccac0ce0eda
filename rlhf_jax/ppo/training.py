"""Proximal policy optimisation of a language model against frozen reward models or functions.

A step samples a batch of episodes, lets Python functions score their texts, if there are any, and
runs one compiled program (`update`). Full fine-tuning and LoRA are the same code; they differ in
what `actor_critic.build` calls trainable.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.devices import check_divisible, on_host, on_mesh, over_devices, sharded
from experiment_runs.process import progress
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_jax.config import PPOConfig
from rlhf_jax.data.dialogues import Conversation, shown
from rlhf_jax.language_model import sharding
from rlhf_jax.language_model.decoder import for_products
from rlhf_jax.language_model.sampling import Responses, draw_keys
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.optimizer import linear_schedule, optimizer_for
from rlhf_jax.optimization.state import (
    check_finite,
    compiled,
    initial_state,
    parameter_counts,
)
from rlhf_jax.ppo import actor_critic
from rlhf_jax.ppo.actor_critic import Policy
from rlhf_jax.ppo.rewards import (
    Reward,
    Term,
    function_rewards,
    functions_of,
    models_of,
    reward_terms,
)
from rlhf_jax.ppo.rollout import Episodes, Frozen, Static, cost, draw, histogram
from rlhf_jax.ppo.update import update
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.responses import response_texts
from rlhf_jax.pretrained.tokenizer import Tokenizer

ROLLOUT, DROPOUT = 0, 1  # random streams
CHECKED = ("policy_loss", "value_loss", "kl", "gradient_norm")  # metrics that must stay finite


def check(cfg: PPOConfig, pretrained: Pretrained) -> None:
    """Stops before anything is trained.

    Raises:
      UserError: a batch, a forward batch or the model cannot be divided over the devices.
    """
    for field in ("batch", "forward_batch", "prompts_per_step"):
        check_divisible(f"PPOConfig.{field}", getattr(cfg, field))
    sharding.check(pretrained.config)


@on_mesh
def train(
    run: Run,
    cfg: PPOConfig,
    pretrained: Pretrained,
    reward: Reward,
    prompts: Sequence[Conversation],
) -> None:
    """Trains one variant and saves what it trained.

    Args:
      run: where to log; resumes from its checkpoints.
      cfg: the configuration; `cfg.lora` makes it the LoRA variant.
      pretrained: the model to start from, and the reference.
      reward: a frozen reward model, a function of prompts and responses, or several of them by
        name with their weights, which are added up.
      prompts: to train on; `cfg.prompts` of them.

    Raises:
      UserError: as `check`; the reward is none, or a function of it returns what is none.
    """
    check(cfg, pretrained)
    terms = reward_terms(reward)
    models = models_of(terms)
    tokenizer = pretrained.tokenizer
    rows, masks, cut = prompt_rows(prompts, tokenizer, length=cfg.prompt_tokens)
    fixed = dataclasses.replace(
        pretrained, state=for_products(pretrained.state, pretrained.config.products)
    )
    tuned = untrained(fixed if cfg.lora else pretrained, cfg)
    optimizer = ppo_optimizer(cfg)
    state = initial_state(tuned.trainable, optimizer)
    static = Static(
        tuned.definition, pretrained.definition,
        tuple((name, term.weight, term.scorer.definition) for name, term in models.items()),
        optimizer, cfg, tokenizer.ends,
    )  # fmt: skip
    reward_states = {name: term.scorer.for_products().state for name, term in models.items()}
    frozen = sharded(Frozen(tuned.frozen, fixed.state, reward_states), RULES)
    checkpoints = Checkpoints(run.checkpoints, run.identity)
    start, notes, program = 0, {"kl_weight": cfg.kl_weight}, None
    if restored := checkpoints.restore(state):
        start, state, notes = restored
    run.rewind(start or -1)
    key = jax.random.key(cfg.seed)
    bar = progress(label=run.stage, total=cfg.steps, initial=start)
    for step in range(start, cfg.steps):
        chosen = episode_prompts(cfg, len(prompts), step)
        answered, numbers = numbered(chosen, cfg.responses_per_prompt)
        keys = draw_keys(step_key(key, ROLLOUT, step), numbers)
        asked, keys = over_devices(((rows[chosen], masks[chosen]), keys))
        batch = over_devices((rows[answered], masks[answered]))
        began = time.perf_counter()
        responses = draw(Policy(tuned.definition, state.trainable, frozen.policy), asked,
                         keys, cfg, tokenizer)  # fmt: skip
        jax.block_until_ready(responses)
        sampled = time.perf_counter()
        given = given_terms(terms, [prompts[i] for i in answered], responses, tokenizer)
        arguments = (
            state, frozen, *batch, responses, over_devices(given), notes["kl_weight"],
            step_key(key, DROPOUT, step),
        )  # fmt: skip
        program = program or compiled(update, *arguments, static=static)
        state, metrics, episodes = program(*arguments)
        episodes = on_host(episodes)
        row = to_row(metrics)
        check_finite(step + 1, **{name: row[name] for name in CHECKED if name in row})
        run.log(
            step=step + 1, epoch=(step + 1) * cfg.passes / cfg.steps, **row, **notes,
            **cost(episodes, sampled - began, time.perf_counter() - sampled),
            reward_histogram=histogram(episodes.reward),
        )  # fmt: skip
        if step % cfg.sample_every == 0 or step + 1 == cfg.steps:
            keep_samples(run, step + 1, [prompts[i] for i in answered], episodes, tokenizer)
        weight = objectives.next_kl_weight(
            notes["kl_weight"], row["kl"], target=cfg.target_kl, gain=cfg.kl_gain
        )
        notes = {"kl_weight": weight}
        checkpoints.maybe_save(step + 1, state, notes)
        bar.update()
        bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{row['kl']:.3f}")
    bar.close()
    checkpoints.close()
    save_weights(run.checkpoints / "policy", state.trainable, step=cfg.steps)
    run.finish(**outcome(run, cfg, state.trainable), prompts_cut=cut, prompts=len(prompts))


def given_terms(
    terms: Mapping[str, Term],
    prompts: Sequence[Conversation],
    responses: Responses,
    tokenizer: Tokenizer,
) -> dict[str, Float[np.ndarray, "batch"]]:
    """The terms of the reward that functions make of the texts, times their weights."""
    functions = functions_of(terms)
    if not functions:
        return {}
    rewards = function_rewards(functions, prompts, response_texts(on_host(responses), tokenizer))
    return {name: np.float32(terms[name].weight) * own for name, own in rewards.items()}


def untrained(pretrained: Pretrained, cfg: PPOConfig) -> Policy:
    """The policy that a configuration starts from."""
    return actor_critic.build(pretrained, cfg.lora, seed=cfg.seed, critic=cfg.has_critic)


def ppo_optimizer(cfg: PPOConfig) -> optax.GradientTransformation:
    """Adam for the policy and for the value head; everything else is masked.

    The rates rise for a short while, then fall linearly to zero over the run (N+).
    """
    steps = cfg.steps * cfg.inner_epochs

    def adam(rate):
        schedule = linear_schedule(rate, steps, cfg.warmup_fraction)
        return optax.adam(schedule, eps=cfg.adam_epsilon)

    return optimizer_for(
        {"policy": adam(cfg.learning_rate), "value": adam(cfg.value_learning_rate)},
        functools.partial(actor_critic.group, lora=cfg.lora),
        clip_norm=cfg.clip_norm,
    )


def episode_prompts(cfg: PPOConfig, available: int, step: int) -> np.ndarray:
    """Indices of the prompts of a step: every pass is a permutation of them all."""
    per_pass = cfg.steps // cfg.passes
    order = np.random.default_rng([cfg.seed, step // per_pass]).permutation(available)
    start = (step % per_pass) * cfg.prompts_per_step
    return order[start : start + cfg.prompts_per_step]


def numbered(chosen: np.ndarray, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of every episode, those of a prompt together, and a number of its own for each."""
    answered = np.repeat(chosen, responses)
    return answered, answered * responses + np.tile(np.arange(responses), len(chosen))


def step_key(key: Array, stream: int, step: int) -> Array:
    """The key of one stream at one step."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), step)


def to_row(metrics: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def keep_samples(run: Run, step: int, prompts, episodes: Episodes, tokenizer) -> None:
    """The first episodes of a step, as text."""
    responses, mask = episodes.tokens[:, -episodes.mask.shape[1] :], episodes.mask
    for i in range(min(3, len(prompts))):
        run.sample(
            step=step, prompt=shown(prompts[i]), response=tokenizer.decode(responses[i][mask[i]]),
            reward=float(episodes.reward[i]),
        )  # fmt: skip


def outcome(run: Run, cfg: PPOConfig, trainable: nnx.State) -> dict[str, Any]:
    """The run in a few numbers: where it ended, what it cost."""
    metrics = run.metrics()
    tail = metrics.tail(max(1, len(metrics) // 4))
    settled = metrics.iloc[1:] if len(metrics) > 1 else metrics  # without compilation
    return {
        "steps": cfg.steps,
        "episodes": cfg.steps * cfg.batch,
        "trained_parameters": parameter_counts(trainable),
        "reward_last_quarter": float(tail["reward"].mean()),
        "kl_last_quarter": float(tail["kl"].mean()),
        "sampling_tokens_per_second": float(
            settled["tokens"].sum() / settled["seconds_sampling"].sum()
        ),
        "seconds_sampling": float(settled["seconds_sampling"].median()),
        "seconds_update": float(settled["seconds_update"].median()),
        "peak_memory_gb": float(metrics["peak_memory_gb"].max()),
        "train_seconds": float((metrics["seconds_sampling"] + metrics["seconds_update"]).sum()),
    }


def tuned_decoder(run: Run, cfg: PPOConfig, pretrained: Pretrained) -> tuple[Any, nnx.State]:
    """Static half and arrays of the policy that a finished run trained."""
    start = untrained(pretrained, cfg)
    trainable = load_weights(run.checkpoints / "policy", start.trainable)
    return start._replace(trainable=trainable).decoder()
