"""What a program of one's own calls: load, train, generate, score, evaluate.

The stages of the report run the same trainings. The package exports these names: `import rlhf_jax`.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from experiment_runs import hosts, settings
from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from experiment_runs.run import ensure
from experiment_runs.tracking import StepCallback
from rlhf_jax.config import EvaluationConfig, PPOConfig, RewardConfig
from rlhf_jax.data.dialogues import conversations
from rlhf_jax.data.preferences import posts_fingerprint, preference_posts
from rlhf_jax.data.splits import split_posts
from rlhf_jax.evaluation.policies import answered
from rlhf_jax.evaluation.response_statistics import DESCRIBED, MEASURED, describe
from rlhf_jax.intervals import bootstrap
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.rewards import named_rewards, reward_terms
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import Pretrained, model_fingerprint, tokenizer_fingerprint
from rlhf_jax.pretrained.responses import answers
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.encoding import first_pairs
from rlhf_jax.trained import (
    AnyReward,
    Prompt,
    Reward,
    TrainedRewardModel,
    TunedModel,
    reward_fingerprint,
    reward_for,
    tuned_model,
)

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of the posts


def load(model: str | Path, *, precision: str = "auto") -> Pretrained:
    """A decoder with its weights and tokenizer.

    Args:
      model: a folder in the layout of Hugging Face (config.json, safetensors, tokenizer.json), an
        id on the hub, a GGUF file, or "random" for two small layers on bytes. Llama, Mistral,
        Qwen2, Qwen3, SmolLM3 and Gemma 3 (texts).
      precision: of matrix products: "float32", "mixed" or "bfloat16", or what the machine is
        fast in; see `experiment_runs.precision`. What is trained is kept in float32.

    Raises:
      UserError: there is no such model, or its files do not fit together.
    """
    hosts.join()  # before anything is asked of the devices
    return loading.load(hub.find(str(model)), name=str(model), dtype=precision)


def train_reward_model(
    model: Pretrained,
    pairs: pd.DataFrame | Iterable[Mapping[str, Any]] | str | Path,
    *,
    config: RewardConfig | None = None,
    out: str | Path | None = None,
    on_step: StepCallback | None = None,
) -> TrainedRewardModel:
    """A reward model from preferences (Stiennon et al., 2020), or the one trained before.

    A tenth of the posts chooses the weights that are kept, another tenth tests them; no text is in
    two parts. What was measured is in `.run.summary`.

    Args:
      model: to start from.
      pairs: a frame, or mappings, with prompt, chosen and rejected: texts, or chat messages; or
        where they are: a file, a folder, an id on the hub.
      config: the configuration; `RewardConfig()` by default.
      out: folder of runs. The run gets a folder in it that is named after all that it is made of:
        the same call loads it, or goes on where it was cut off. results/local by default.
      on_step: called with the step and a mapping of what was logged, after every step trained.

    Raises:
      UserError: the pairs cannot be used, or none of them fits.
    """
    cfg = config or RewardConfig()
    if cfg.min_score_ratio > 1:
        raise UserError(
            f"RewardConfig.min_score_ratio={cfg.min_score_ratio}: these pairs have no scores; "
            "leave it at 1, and leave out the pairs that are not clear enough"
        )
    posts = preference_posts(pairs, max_pairs_per_post=cfg.max_pairs_per_post, seed=cfg.seed)
    parts = split_posts(posts, fractions=FRACTIONS, seed=cfg.seed)
    limits = {"train": cfg.train_pairs, "validation": cfg.validation_pairs, "test": cfg.test_pairs}
    parts = {name: first_pairs(parts[name], limit) for name, limit in limits.items()}
    asked = [post.turns or post.prompt for post in parts["train"]][: cfg.reference_samples]
    inputs = {"model": model_fingerprint(model), "posts": posts_fingerprint(parts)}
    root = Path(out or settings.results()).expanduser()
    run = ensure(
        "reward", cfg, lambda run: reward_training.train_on_posts(run, cfg, model, parts, asked),
        inputs=inputs, about=about(model, root), root=root, on_step=on_step,
    )  # fmt: skip
    return TrainedRewardModel(reward_models.load(run, model), model, run, cfg.max_tokens)


def train_policy(
    model: Pretrained,
    prompts: Iterable[Prompt],
    *,
    reward: Reward,
    config: PPOConfig | None = None,
    out: str | Path | None = None,
    on_step: StepCallback | None = None,
    reward_name: str = "",
) -> TunedModel:
    """The model after reinforcement learning, or the one that was tuned before.

    PPO (Schulman et al., 2017) by default; `PPOConfig(advantages="leave-one-out")` and `"group"`
    train without a critic (Ahmadian et al., 2024; Shao et al., 2024).

    Args:
      model: to start from, and the reference of the KL penalty.
      prompts: texts, or chat messages that end with the user's; the model's chat template writes
        every turn.
      reward: a trained reward model; a function of a list of prompts (texts, and lists of messages
        for dialogues) and a list of responses (texts) that returns one finite number for each; or
        {"name": (reward, weight), ...}, which are added up.
      config: the configuration; `PPOConfig` on all prompts by default.
      out: folder of runs. The run gets a folder in it that is named after all that it is made of:
        the same call loads it, or goes on where it was cut off. results/local by default.
      on_step: called with the step and a mapping of what was logged, after every step trained.
      reward_name: stands for the reward's functions in the name of the run. Without it they are
        told apart by their code and by the values that it reads; files and servers are not seen,
        and one that keeps notes, as a cache, needs a name to be found again.

    Raises:
      UserError: the prompts do not fit the configuration, the reward is none, or it is a function
        that cannot be told from others.
      FloatingPointError: the training diverged.
    """
    asked = conversations(prompts)
    cfg = config or PPOConfig(prompts=len(asked))
    if len(asked) < cfg.prompts:
        raise UserError(
            f"PPOConfig.prompts={cfg.prompts}, but {len(asked)} are given; set prompts={len(asked)}"
        )
    asked = asked[: cfg.prompts]
    named = named_rewards(reward)
    terms = reward_terms({n: (reward_for(source, model), w) for n, (source, w) in named.items()})
    inputs = {
        "model": model_fingerprint(model),
        "prompts": fingerprint(asked),
        "reward": rewards_fingerprint(named, reward_name),
    }
    root = Path(out or settings.results()).expanduser()
    try:
        run = ensure(
            "ppo", cfg, lambda run: ppo_training.train(run, cfg, model, terms, asked),
            inputs=inputs, about=about(model, root, [source for source, _ in named.values()]),
            root=root, on_step=on_step,
        )  # fmt: skip
    finally:
        if rewards_fingerprint(named, reward_name) != inputs["reward"]:
            warnings.warn(
                "the reward changes what it reads, so that the same call would not find this run "
                "again; give reward_name='...', another one for every reward that differs",
                stacklevel=2,
            )
    return tuned_model(run, cfg, model)


def generate(
    model: Pretrained,
    prompts: Iterable[Prompt],
    *,
    prompt_tokens: int = 256,
    response_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
) -> list[str]:
    """One response to each prompt; two models get the same random draws.

    Args:
      model: loaded or tuned.
      prompts: texts, or chat messages that end with the user's.
      prompt_tokens: longest prompt, template included; the end of a longer one is cut.
      response_tokens: longest response.
      temperature: 0 takes the most likely token.
      seed: of the draws.
      batch: how many are sampled at a time.

    Raises:
      UserError: temperature, seed, batch or a length is impossible.
    """
    if min(batch, response_tokens) < 1:
        raise UserError(
            f"generate: batch={batch} and response_tokens={response_tokens} must be at least 1"
        )
    asked = conversations(prompts)
    if not asked:
        return []
    answered = answers(
        (model.definition, model.state), asked, model.tokenizer, prompt_tokens=prompt_tokens,
        length=response_tokens, temperature=temperature, seed=seed, batch=batch,
    )  # fmt: skip
    return [text for text, _ in answered]


def evaluate(
    models: Pretrained | Sequence[Pretrained] | Mapping[str, Pretrained],
    prompts: Iterable[Prompt],
    *,
    rewards: AnyReward | Mapping[str, AnyReward],
    config: EvaluationConfig | None = None,
    prompt_tokens: int = 256,
    response_tokens: int = 128,
) -> pd.DataFrame:
    """Models beside each other on the same prompts with the same random draws, one a row.

    Of every reward there are the mean, its 95 % interval (`_low`, `_high`), and the gain over the
    first model, prompt by prompt, with its interval. Beside them: KL to the first model (nats per
    token), their perplexity under the first model, length in tokens, shares of responses that
    ended, of different words and pairs of words and of repeated groups of four.

    Args:
      models: the first is what the others are compared with; all have the same tokenizer.
      prompts: that none was trained on.
      rewards: by name: trained reward models, or functions of prompts and responses; a single one
        is called "reward".
      config: responses per prompt, temperature, seed, batch and resamples of the bootstrap.
      prompt_tokens: longest prompt, template included.
      response_tokens: longest response.

    Raises:
      UserError: two models have one name or different tokenizers, there are no prompts, a reward
        is none, or has the name of another column.
    """
    models = [models] if isinstance(models, Pretrained) else models
    rewards = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    named = models if isinstance(models, Mapping) else {model.name: model for model in models}
    if len(named) < len(models):
        raise UserError("evaluate: two models have the same name; give {'name': model, ...}")
    if len({tokenizer_fingerprint(model) for model in named.values()}) != 1:
        raise UserError("evaluate: give one model or more, all with the same tokenizer")
    if taken := sorted({*MEASURED, *DESCRIBED} & {*rewards}):
        raise UserError(f"evaluate: rewards named {', '.join(taken)}, as other columns are; rename")
    asked, first = conversations(prompts), next(iter(named.values()))
    if not asked:
        raise UserError("evaluate: no prompts; give one or more")
    cfg = config or EvaluationConfig()
    terms = reward_terms({n: (reward_for(reward, first), 1.0) for n, reward in rewards.items()})
    lengths = PPOConfig(prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    decoders = {
        name: lambda model=model: (model.definition, model.state) for name, model in named.items()
    }
    columns, responses = answered(
        decoders, tokenizer=first.tokenizer, rewards=terms, prompts=asked, cfg=cfg,
        lengths=lengths, reference=(first.definition, first.state),
        samples=cfg.responses_per_prompt,
    )  # fmt: skip
    base, rows = columns[next(iter(named))], {}
    for name, own in reversed(columns.items()):  # the first has no gains
        row: dict[str, float] = {}
        for reward in rewards:
            row |= with_interval(reward, own[reward], cfg)
            if own is not base:
                row |= with_interval(f"{reward}_gain", own[reward] - base[reward], cfg)
        rows[name] = row | describe(own, responses[name], np.arange(len(asked)), cfg, rewards=[])
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return frame.loc[[*columns]]


def rewards_fingerprint(named: Mapping[str, tuple[AnyReward, float]], name: str) -> str:
    """Tells a policy's rewards and their weights from others; a name stands for functions."""
    told = {n: [reward_fingerprint(source, name), weight] for n, (source, weight) in named.items()}
    return fingerprint(told)


def with_interval(
    name: str, values: Float[np.ndarray, "prompts samples"], cfg: EvaluationConfig
) -> dict[str, float]:
    """A mean with its 95 % interval, prompts drawn with replacement."""
    found = bootstrap(values.mean(axis=1), resamples=cfg.resamples, seed=cfg.seed)._asdict()
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def about(model: Pretrained, root: Path, rewards: Iterable[Any] | None = None) -> dict[str, Any]:
    """What a run was made with, in words; other runs by their paths from the folder of runs."""

    def path_of(made: TunedModel | TrainedRewardModel) -> str:
        return Path(os.path.relpath(made.run.path, root)).as_posix()

    start = {"name": model.name, "file": model.origin, "dtype": model.config.dtype}
    if isinstance(model, TunedModel):
        start["run"] = path_of(model)
    if rewards is None:
        return {"model": start}
    trained = [path_of(reward) for reward in rewards if isinstance(reward, TrainedRewardModel)]
    return {"model": start, "reward_models": trained}
