"""Proximal policy optimisation of a language model against a frozen reward model.

A step samples a batch of episodes and then runs one compiled program: scoring by policy,
reference and reward model, advantages, and all inner epochs. Full fine-tuning and LoRA are the
same code; they differ in what `policy.build` calls trainable.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.process import progress
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_jax.config import PPOConfig
from rlhf_jax.devices import check_divisible, over_devices, replicated
from rlhf_jax.language_model.logprobs import token_logprobs
from rlhf_jax.language_model.sampling import Responses, divided, draw_keys, ends_response
from rlhf_jax.optimization.optimizer import at_step, linear_schedule, optimizer_for
from rlhf_jax.optimization.state import (
    TrainState,
    check_finite,
    compiled,
    initial_state,
    parameter_counts,
)
from rlhf_jax.ppo import actor_critic
from rlhf_jax.ppo.actor_critic import Policy
from rlhf_jax.ppo.rollout import (
    Episodes,
    Frozen,
    Static,
    cost,
    draw,
    episode_metrics,
    histogram,
    score,
)
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.reward_model.model import Judge

ROLLOUT, DROPOUT = 0, 1  # random streams


def train(
    run: Run, cfg: PPOConfig, pretrained: Pretrained, judge: Judge, prompts: Sequence[str]
) -> None:
    """Trains one variant and saves what it trained.

    Args:
      run: where to log; resumes from its checkpoints.
      cfg: the configuration; `cfg.lora` makes it the LoRA variant.
      pretrained: the model to start from, and the reference.
      judge: the frozen reward model.
      prompts: to train on; `cfg.prompts` of them.

    Raises:
      UserError: a batch or a forward batch cannot be divided over the devices.
    """
    for field in ("batch", "forward_batch"):
        check_divisible(f"PPOConfig.{field}", getattr(cfg, field))
    tokenizer = pretrained.tokenizer
    rows, masks, cut = prompt_rows(prompts, tokenizer, length=cfg.prompt_tokens)
    tuned = untrained(pretrained, cfg)
    optimizer = ppo_optimizer(cfg)
    state = initial_state(tuned.trainable, optimizer)
    static = Static(
        tuned.definition, pretrained.definition, judge.definition, optimizer, cfg, tokenizer.ends
    )
    frozen = replicated(Frozen(tuned.frozen, pretrained.state, judge.state))
    checkpoints = Checkpoints(run.checkpoints)
    start, notes, program = 0, {"kl_weight": cfg.kl_weight}, None
    if restored := checkpoints.restore(state):
        start, state, notes = restored
    run.rewind(start or -1)
    key = jax.random.key(cfg.seed)
    bar = progress(label=run.stage, total=cfg.steps, initial=start)
    for step in range(start, cfg.steps):
        chosen = episode_prompts(cfg, len(prompts), step)
        keys = draw_keys(step_key(key, ROLLOUT, step), chosen)
        *batch, keys = over_devices((rows[chosen], masks[chosen], keys))
        began = time.perf_counter()
        responses = draw(Policy(tuned.definition, state.trainable, frozen.policy), batch,
                         keys, cfg, tokenizer)  # fmt: skip
        jax.block_until_ready(responses)
        sampled = time.perf_counter()
        arguments = (
            state, frozen, *batch, responses, notes["kl_weight"], step_key(key, DROPOUT, step)
        )  # fmt: skip
        program = program or compiled(update, *arguments, static=static)
        state, metrics, episodes = program(*arguments)
        row = to_row(metrics)
        watched = ("policy_loss", "value_loss", "kl", "gradient_norm")
        check_finite(step + 1, **{name: row[name] for name in watched})
        run.log(
            step=step + 1, epoch=(step + 1) * cfg.passes / cfg.steps, **row, **notes,
            **cost(episodes, sampled - began, time.perf_counter() - sampled),
            reward_histogram=histogram(episodes.reward),
        )  # fmt: skip
        if step % cfg.sample_every == 0 or step + 1 == cfg.steps:
            keep_samples(run, step + 1, [prompts[i] for i in chosen], episodes, tokenizer)
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


def untrained(pretrained: Pretrained, cfg: PPOConfig) -> Policy:
    """The policy that a configuration starts from."""
    return actor_critic.build(pretrained, cfg.lora, seed=cfg.seed)


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
    start = (step % per_pass) * cfg.batch
    return order[start : start + cfg.batch]


def step_key(key: Array, stream: int, step: int) -> Array:
    """The key of one stream at one step."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), step)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def update(
    state: TrainState,
    frozen: Frozen,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    responses: Responses,
    kl_weight: float | Float[Array, ""],
    key: Array,
    *,
    static: Static,
) -> tuple[TrainState, dict[str, Array], Episodes]:
    """Scores the episodes and runs all inner epochs on them, in one program."""
    cfg = static.cfg
    episodes = score(state.trainable, frozen, prompts, prompt_mask, responses, static=static)
    ended = ends_response(responses.tokens, static.end)
    cut_off = ~(ended & responses.mask).any(axis=1)
    token_rewards = objectives.token_rewards(
        episodes.reward - cfg.missing_end_penalty * cut_off,
        episodes.logprobs, episodes.reference_logprobs, episodes.mask, kl_weight=kl_weight,
    )  # fmt: skip
    advantages = objectives.generalized_advantages(
        token_rewards, episodes.values, episodes.mask,
        discount=cfg.discount, decay=cfg.gae_decay,
    )  # fmt: skip
    returns = advantages + episodes.values
    whitened = objectives.masked_whiten(advantages, episodes.mask)
    state, inner = optimise(state, frozen, episodes, whitened, returns, key, static=static)
    return state, inner | episode_metrics(episodes, responses, returns, cut_off), episodes


def optimise(
    state, frozen, episodes, advantages, returns, key, *, static
) -> tuple[TrainState, dict[str, Array]]:
    """The inner epochs: one optimizer step each, gradients summed over forward batches.

    An epoch that finds the policy further than `approx_kl_limit` from the one that sampled is the
    last. Metrics are those of the first and of the last epoch that ran. The learning rate goes on
    as if all had run, so that it ends at zero.
    """
    cfg = static.cfg
    count = jnp.maximum(episodes.mask.sum(), 1)
    parts = divided((episodes, advantages, returns), cfg.forward_batch)
    number = jnp.arange(cfg.batch // cfg.forward_batch)

    def loss_fn(trainable, part, dropout_key):
        model = nnx.merge(static.policy, trainable, frozen.policy)
        return ppo_loss(model, *part, dropout_key, count=count, static=static)

    def epoch(carry):
        index, state, first, _ = carry
        epoch_key = jax.random.fold_in(key, index)

        def accumulate(total, item):
            number, part = item
            dropout_key = jax.random.fold_in(epoch_key, number) if cfg.lora else None
            (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.trainable, part, dropout_key
            )
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        grads, metrics = jax.lax.scan(accumulate, zeros, (number, parts))
        metrics = jax.tree.map(jnp.sum, metrics)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        updates, opt_state = static.optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        state = TrainState(trainable, opt_state, state.step + 1)
        first = jax.tree.map(lambda a, b: jnp.where(index == 0, b, a), first, metrics)
        return index + 1, state, first, metrics

    def going_on(carry):
        index, _, _, metrics = carry
        return (index < cfg.inner_epochs) & (metrics["approx_kl"] <= cfg.approx_kl_limit)

    empty = dict.fromkeys((*METRICS, "gradient_norm"), jnp.zeros(()))
    planned = state.step + cfg.inner_epochs
    index, state, first, last = jax.lax.while_loop(going_on, epoch, (0, state, empty, empty))
    state = state._replace(opt_state=at_step(state.opt_state, planned), step=planned)
    return state, last | {
        "inner_epochs": index,
        "first_ratio_error": first["ratio_error"],
        "first_approx_kl": first["approx_kl"],
    }


METRICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_error")


def ppo_loss(model, episodes, advantages, returns, dropout_key, *, count, static):
    """Policy and value loss of some episodes, as their share of the whole batch's mean (@eq-total).

    Args:
      model: the actor-critic being trained.
      episodes, advantages, returns: of one forward batch.
      dropout_key: for the adapters' dropout; None where there is none.
      count: response tokens in the whole batch.
      static: configuration.
    """
    cfg = static.cfg
    width = episodes.tokens.shape[1] - episodes.mask.shape[1]
    states, values = model.states_and_values(
        episodes.tokens, episodes.token_mask, width, dropout_key
    )
    logprobs = token_logprobs(model.decoder, states, episodes.tokens[:, width:], cfg.temperature)
    # Outside the mask nothing may count, not even as infinity times zero.
    logprobs = jnp.where(episodes.mask, logprobs, episodes.logprobs)
    policy_losses = objectives.clipped_policy_loss(
        logprobs, episodes.logprobs, advantages, ratio_clip=cfg.ratio_clip
    )
    value_losses = objectives.clipped_value_loss(
        values, episodes.values, returns, value_clip=cfg.value_clip
    )
    distance = jnp.abs(jnp.exp(logprobs - episodes.logprobs) - 1)

    def share(x):
        return jnp.where(episodes.mask, x, 0.0).sum() / count

    policy_loss, value_loss = share(policy_losses), share(value_losses)
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": share(objectives.approximate_kl(logprobs, episodes.logprobs)),
        "clip_fraction": share(distance > cfg.ratio_clip),
        "ratio_error": share(distance),
    }
    return policy_loss + cfg.value_weight * value_loss, metrics


def to_row(metrics: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def keep_samples(run: Run, step: int, prompts, episodes: Episodes, tokenizer) -> None:
    """The first episodes of a step, as text."""
    responses = np.asarray(episodes.tokens[:, -episodes.mask.shape[1] :])
    mask = np.asarray(episodes.mask)
    for i in range(min(3, len(prompts))):
        run.sample(
            step=step, prompt=prompts[i], response=tokenizer.decode(responses[i][mask[i]]),
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
