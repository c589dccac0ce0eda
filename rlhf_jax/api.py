"""What a program of one's own calls: load, train, generate, score, evaluate.

The stages of the report run the same trainings. The package exports these names: `import rlhf_jax`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Float

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from experiment_runs.run import Run, ensure
from rlhf_jax.config import EvaluationConfig, PPOConfig, RewardConfig
from rlhf_jax.data.dialogues import question, turns
from rlhf_jax.data.preferences import preference_posts
from rlhf_jax.data.splits import split_posts
from rlhf_jax.evaluation.policies import answered
from rlhf_jax.evaluation.response_statistics import describe
from rlhf_jax.export.huggingface import export_policy, generation_settings, merged_adapters
from rlhf_jax.intervals import bootstrap
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.rewards import RewardFunction, function_fingerprint, reward_terms
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import Pretrained, model_fingerprint, tokenizer_fingerprint
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.responses import respond, response_rows, response_texts
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.encoding import first_pairs
from rlhf_jax.reward_model.model import FrozenRewardModel, response_rewards

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of the posts
Prompt = str | Sequence[Mapping[str, str]]  # a text, or chat messages that end with the user's


@dataclasses.dataclass(frozen=True)
class TunedModel(Pretrained):
    """A model that was tuned, to be used like any other, and the run that did it."""

    run: Run
    settings: PPOConfig

    def save(self, folder: str | Path) -> None:
        """Writes the model in the layout of Hugging Face, for `load` and for transformers."""
        decoder = nnx.merge(self.definition, self.state)
        export_policy(decoder, self, Path(folder), generation_settings(self.settings))


@dataclasses.dataclass(frozen=True)
class TrainedRewardModel:
    """A frozen reward model and the run that trained it."""

    frozen: FrozenRewardModel
    pretrained: Pretrained
    run: Run
    max_tokens: int  # of prompt and response together

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, batch: int = 16
    ) -> list[float]:
        """Rewards of responses, in deviations from the mean of the untrained model's responses.

        It is a reward function itself: for a policy with another tokenizer give `rm.score`.

        Args:
          prompts: one a response, texts or chat messages; the end of a long one is cut.
          responses: texts.
          batch: how many are read at a time.

        Raises:
          UserError: there are not as many prompts as responses.
        """
        if len(prompts) != len(responses):
            raise UserError(f"score: {len(prompts)} prompts but {len(responses)} responses")
        if not responses:
            return []
        tokenizer, texts = self.pretrained.tokenizer, prompt_texts(prompts)
        room = self.max_tokens - tokenizer.template_length
        replies, _ = response_rows(responses, tokenizer, length=max(room // 2, 1))
        length = self.max_tokens - replies.tokens.shape[1]
        rows, masks, _ = prompt_rows(texts, tokenizer, length=length)
        rewards = []
        for start in range(0, len(rows), batch):
            part = slice(start, start + batch)
            rewards += response_rewards(
                self.frozen.state, rows[part], masks[part], Responses(*(x[part] for x in replies)),
                definition=self.frozen.definition, end=tokenizer.ends,
            ).tolist()  # fmt: skip
        return rewards


AnyReward = TrainedRewardModel | RewardFunction
Reward = AnyReward | Mapping[str, tuple[AnyReward, float]]


def load(model: str | Path, *, dtype: str = "float32") -> Pretrained:
    """A decoder with its weights and tokenizer.

    Args:
      model: a folder in the layout of Hugging Face (config.json, safetensors, tokenizer.json), an
        id on the hub, or "random" for two small layers on bytes. Llama, Qwen2 and Qwen3.
      dtype: of the activations, "float32" or "bfloat16"; weights are kept in float32.

    Raises:
      UserError: there is no such model, or its files do not fit together.
    """
    return loading.load(hub.find(str(model)), name=str(model), dtype=dtype)


def train_reward_model(
    model: Pretrained,
    pairs: pd.DataFrame | Iterable[Mapping[str, Any]],
    *,
    config: RewardConfig | None = None,
    out: str | Path | None = None,
) -> TrainedRewardModel:
    """A reward model from preferences (Stiennon et al., 2020), or the one trained before.

    A tenth of the posts chooses the weights that are kept, another tenth tests them; no text is in
    two parts. What was measured is in `.run.summary`.

    Args:
      model: to start from.
      pairs: a frame, or mappings, with prompt, chosen and rejected: texts, or chat messages.
      config: the configuration; `RewardConfig()` by default.
      out: folder of runs. The run gets a folder in it that is named after all that it is made of:
        the same call loads it, or goes on where it was cut off. results/local by default.

    Raises:
      UserError: the pairs cannot be used, or none of them fits.
    """
    cfg = config or RewardConfig()
    posts = preference_posts(pairs, max_pairs_per_post=cfg.max_pairs_per_post, seed=cfg.seed)
    parts = split_posts(posts, fractions=FRACTIONS, seed=cfg.seed)
    limits = {"train": cfg.train_pairs, "validation": cfg.validation_pairs, "test": cfg.test_pairs}
    parts = {name: first_pairs(parts[name], limit) for name, limit in limits.items()}
    asked = [post.prompt for post in parts["train"]][: cfg.reference_samples]
    inputs = {
        "model": model_fingerprint(model),
        "posts": fingerprint({n: [*map(dataclasses.astuple, own)] for n, own in parts.items()}),
    }
    run = ensure(
        "reward", cfg, lambda run: reward_training.train_on_posts(run, cfg, model, parts, asked),
        inputs=inputs, about=about(model), root=out and Path(out),
    )  # fmt: skip
    return TrainedRewardModel(reward_models.load(run, model), model, run, cfg.max_tokens)


def train_policy(
    model: Pretrained,
    prompts: Sequence[Prompt],
    *,
    reward: Reward,
    config: PPOConfig | None = None,
    out: str | Path | None = None,
) -> TunedModel:
    """The model after reinforcement learning, or the one that was tuned before.

    PPO (Schulman et al., 2017) by default; `PPOConfig(advantages="leave-one-out")` and `"group"`
    train without a critic (Ahmadian et al., 2024; Shao et al., 2024).

    Args:
      model: to start from, and the reference of the KL penalty.
      prompts: texts, or chat messages that end with the user's.
      reward: a trained reward model; a function of a list of prompts and a list of responses, both
        texts, that returns one finite number for each; or {"name": (reward, weight), ...}, which
        are added up. Functions are told from another by their source text: name another `out`
        when something that they read has changed.
      config: the configuration; `PPOConfig` on all prompts by default.
      out: folder of runs. The run gets a folder in it that is named after all that it is made of:
        the same call loads it, or goes on where it was cut off. results/local by default.

    Raises:
      UserError: the prompts do not fit the configuration, or the reward is none.
      FloatingPointError: the training diverged.
    """
    texts = prompt_texts(prompts)
    cfg = config or PPOConfig(prompts=len(texts))
    if len(texts) < cfg.prompts:
        raise UserError(
            f"PPOConfig.prompts={cfg.prompts}, but {len(texts)} are given; set prompts={len(texts)}"
        )
    texts = texts[: cfg.prompts]
    sources = reward if isinstance(reward, Mapping) else {"reward": (reward, 1.0)}
    inputs = {
        "model": model_fingerprint(model),
        "prompts": fingerprint(texts),
        "reward": fingerprint({n: source_fingerprint(pair) for n, pair in sources.items()}),
    }
    terms = usable(reward, model)
    run = ensure(
        "ppo", cfg, lambda run: ppo_training.train(run, cfg, model, terms, texts),
        inputs=inputs, about=about(model), root=out and Path(out),
    )  # fmt: skip
    decoder = merged_adapters(nnx.merge(*ppo_training.tuned_decoder(run, cfg, model)))
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Pretrained)}
    fields |= {"name": run.path.name, "origin": str(run.path), "state": nnx.state(decoder)}
    return TunedModel(**fields, run=run, settings=cfg)


def generate(
    model: Pretrained,
    prompts: Sequence[Prompt],
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
    """
    if not prompts:
        return []
    rows, masks, _ = prompt_rows(prompt_texts(prompts), model.tokenizer, length=prompt_tokens)
    texts = []
    for start in range(0, len(rows), batch):
        responses = respond(
            (model.definition, model.state), rows[start : start + batch],
            masks[start : start + batch], model.tokenizer, length=response_tokens,
            temperature=temperature, seed=seed, first=start,
        )  # fmt: skip
        texts += response_texts(responses, model.tokenizer)
    return texts


def evaluate(
    models: Sequence[Pretrained] | Mapping[str, Pretrained],
    prompts: Sequence[Prompt],
    *,
    rewards: Mapping[str, AnyReward],
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
      rewards: by name: trained reward models, or functions of prompts and responses.
      config: responses per prompt, temperature, seed, batch and resamples of the bootstrap.
      prompt_tokens: longest prompt, template included.
      response_tokens: longest response.

    Raises:
      UserError: two models have one name, or a reward is none.
    """
    named = models if isinstance(models, Mapping) else {model.name: model for model in models}
    if len(named) < len(models):
        raise UserError("evaluate: two models have the same name; give {'name': model, ...}")
    texts, first = prompt_texts(prompts), next(iter(named.values()))
    cfg = config or EvaluationConfig()
    terms = usable({name: (reward, 1.0) for name, reward in rewards.items()}, first)
    lengths = PPOConfig(prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    decoders = {
        name: functools.partial(tuple, [model.definition, model.state])
        for name, model in named.items()
    }
    columns, responses = answered(
        decoders, tokenizer=first.tokenizer, rewards=reward_terms(terms), prompts=texts, cfg=cfg,
        lengths=lengths, reference=(first.definition, first.state),
        samples=cfg.responses_per_prompt,
    )  # fmt: skip
    base, rows = columns[next(iter(named))], {}
    for name, own in columns.items():
        apart = np.arange(len(texts))
        row: dict[str, Any] = describe(own, responses[name], apart, cfg, rewards=[])
        for reward in rewards:
            row |= with_interval(reward, own[reward], cfg)
            if name != next(iter(named)):
                row |= with_interval(f"{reward}_gain", own[reward] - base[reward], cfg)
        rows[name] = row
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    first_columns = [name for name in frame if name.startswith(tuple(rewards))]
    return frame[[*first_columns, *(name for name in frame if name not in first_columns)]]


def with_interval(
    name: str, values: Float[np.ndarray, "prompts samples"], cfg: EvaluationConfig
) -> dict[str, float]:
    """A mean with its 95 % interval, prompts drawn with replacement."""
    found = bootstrap(values.mean(axis=1), resamples=cfg.resamples, seed=cfg.seed).asdict()
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def prompt_texts(prompts: Sequence[Any]) -> list[str]:
    """Prompts as the texts that go into the template.

    A dialogue of several turns is one text in which the speaker stands before each turn, as in
    preference data: reward model and policy read it alike.

    Raises:
      UserError: a prompt is empty, or does not end with the user's message.
    """
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number}"
        asked = [("user", prompt)] if isinstance(prompt, str) else turns(prompt, where)
        if not asked or asked[-1][0] != "user" or not asked[-1][1].strip():
            raise UserError(f"{where} is {prompt!r:.80}; it must end with a message of the user's")
        texts.append(prompt if isinstance(prompt, str) else question(asked))
    return texts


def usable(reward: Any, model: Pretrained) -> Any:
    """The reward as the training takes it: trained reward models as what is compiled.

    Raises:
      UserError: a reward model reads other tokens than the model writes.
    """
    if isinstance(reward, Mapping):
        return {
            name: (usable(pair[0], model), *pair[1:]) if isinstance(pair, tuple) else pair
            for name, pair in reward.items()
        }
    if not isinstance(reward, TrainedRewardModel):
        return reward
    if tokenizer_fingerprint(reward.pretrained) != tokenizer_fingerprint(model):
        raise UserError(
            f"the reward model {reward.run.path.name} has another tokenizer than {model.name}; "
            "give its method `score` as the reward, which reads texts"
        )
    return reward.frozen


def source_fingerprint(pair: Any) -> str:
    """Tells the summands of a reward apart."""
    source, weight = pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, None)
    if isinstance(source, TrainedRewardModel):
        return fingerprint(source.run.identity, weight)
    owner = getattr(source, "__self__", None)
    if isinstance(owner, TrainedRewardModel):  # its `score`
        return fingerprint("score", owner.run.identity, weight)
    return fingerprint(function_fingerprint(source) if callable(source) else repr(source), weight)


def about(model: Pretrained) -> dict[str, Any]:
    """What a run was made with, in words."""
    dtype = str(model.config.dtype)
    return {"model": {"name": model.name, "file": model.origin, "dtype": dtype}}
