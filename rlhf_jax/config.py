"""Configurations of the stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiment_runs import assignment as protocol
from experiment_runs.configuration import (
    check_fraction,
    check_not_negative,
    check_positive,
    check_seed,
    check_tokens,
    check_types,
    made,
    reject,
)
from experiment_runs.errors import UserError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al., 2022): W x + alpha / rank * B A x."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.2  # on the adapter's input, in updates only
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        check_types(self)
        check_positive(self, "rank", "alpha")
        if self.dropout and not 1 / 256 <= self.dropout <= 255 / 256:  # it is drawn as a byte
            reject(self, "dropout", "0, or from 1/256 to 255/256")
        if not self.targets:
            reject(self, "targets", f"one or more of {', '.join(LINEAR_LAYERS)}")
        if unknown := set(self.targets) - set(LINEAR_LAYERS):
            raise UserError(
                f"LoRAConfig.targets={sorted(unknown)} unknown; choose from {LINEAR_LAYERS}"
            )


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
RATED_PROMPTS = protocol.ASSIGNMENT["ratings"]["prompts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward model from pairwise preferences, all pairs of a post in one forward pass."""

    loss: Literal["hinge", "logistic"] = "hinge"
    margin: float = 1.0  # of the hinge, in units of the raw score
    lora: LoRAConfig | None = None  # None trains every weight
    learning_rate: float = 5e-5
    warmup_fraction: float = 0.05  # of the steps; the rate then falls linearly to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    batch_pairs: int = 8
    batch_rows: int = 8  # of max_tokens, filled with posts; full rows end a batch earlier
    epochs: int = 5
    evaluations_per_epoch: int = 2  # on the validation pairs; the best one is kept
    train_pairs: int | None = None  # None: all there are
    validation_pairs: int | None = 1000
    test_pairs: int | None = None
    max_pairs_per_post: int | None = 10
    min_score_ratio: float = 1.0
    max_tokens: int = 512  # of prompt and reply together; the prompt is cut to fit
    reference_samples: int = 128  # responses on which the reward is centred and scaled
    reference_prompt_tokens: int = 256
    reference_response_tokens: int = 128
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "learning_rate", "batch_pairs", "epochs", "evaluations_per_epoch")
        check_positive(self, "batch_rows", "max_tokens", "clip_norm", "max_pairs_per_post")
        check_positive(self, "train_pairs", "validation_pairs", "test_pairs")
        check_positive(self, "reference_prompt_tokens", "reference_response_tokens")
        check_tokens(self, "batch_rows", "max_tokens")
        lengths = ("reference_prompt_tokens", "reference_response_tokens")
        check_tokens(self, "reference_samples", *lengths)
        check_not_negative(self, "margin", "weight_decay")
        check_fraction(self, "warmup_fraction")
        check_seed(self)
        if self.reference_samples < 2:
            reject(self, "reference_samples", "2 or more: one response has no deviation")
        if self.min_score_ratio < 1:
            raise UserError(f"RewardConfig.min_score_ratio={self.min_score_ratio} must be >= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al., 2017) on token-level rewards.

    N+ marks what the original RLHF code does as documented by Huang et al. (2024).
    """

    lora: LoRAConfig | None = None  # None trains every weight
    # From a value head (Schulman et al., 2016), or from the other responses to the same prompt:
    # Ahmadian et al. (2024), RLOO, and Shao et al. (2024), GRPO. These two train no value head.
    advantages: Literal["gae", "leave-one-out", "group"] = "gae"
    responses_per_prompt: int = 1  # in a step
    learning_rate: float = 1e-5
    value_learning_rate: float = 1e-4  # the value head starts at zero and has little time
    warmup_fraction: float = 0.05  # of the optimizer's steps; the rates then fall linearly to zero
    adam_epsilon: float = 1e-5  # N+, and Huang et al. (2022): PyTorch's 1e-8 is too small here
    clip_norm: float = 1.0
    batch: int = 64  # episodes per step
    forward_batch: int = 16  # episodes per forward and backward pass
    passes: int = 5  # over the prompts
    inner_epochs: int = 4  # over each batch of episodes
    prompts: int = 2000
    prompt_tokens: int = 256  # template included; the user's text is cut to fit
    response_tokens: int = 128
    # Of the rollouts and of every logprob. No top-p, no top-k: logprobs of what was drawn from a
    # cut distribution are not those of the policy (TRL's and others' KL below zero).
    temperature: float = 1.0
    discount: float = 1.0  # gamma, per token
    gae_decay: float = 0.95  # lambda in GAE
    ratio_clip: float = 0.2  # epsilon (Schulman et al., 2017)
    value_clip: float = 0.2  # N+; in units of the normalised reward
    value_weight: float = 0.1  # N+
    kl_weight: float = 0.05  # beta at the start, reward per nat
    target_kl: float = 0.05  # nats per token, policy to reference
    kl_gain: float = 0.3  # per step, of the controller of beta, in log space
    approx_kl_limit: float = 0.1  # nats per token; an update beyond it ends the inner epochs
    missing_end_penalty: float = 1.0  # N+; taken from the reward of a response that was cut off
    sample_every: int = 10  # steps between the samples that are kept
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "learning_rate", "value_learning_rate", "adam_epsilon", "clip_norm")
        check_positive(self, "batch", "forward_batch", "passes", "inner_epochs", "sample_every")
        check_positive(self, "prompts", "prompt_tokens", "response_tokens", "temperature")
        check_positive(self, "ratio_clip", "value_clip", "target_kl")
        for rows in ("batch", "forward_batch"):
            check_tokens(self, rows, "prompt_tokens", "response_tokens")
        check_not_negative(self, "value_weight", "kl_weight", "kl_gain", "missing_end_penalty")
        check_fraction(self, "warmup_fraction")
        check_seed(self)
        if self.approx_kl_limit <= 0:
            reject(self, "approx_kl_limit", "above zero; inf never ends the inner epochs early")
        if self.batch % self.forward_batch:
            raise UserError(
                f"PPOConfig.batch={self.batch} is not a multiple of "
                f"forward_batch={self.forward_batch}"
            )
        if self.responses_per_prompt < 1 or self.batch % self.responses_per_prompt:
            raise UserError(
                f"PPOConfig.responses_per_prompt={self.responses_per_prompt} does not divide "
                f"batch={self.batch}, the episodes of a step"
            )
        if self.responses_per_prompt == 1 and not self.has_critic:
            raise UserError(
                f"PPOConfig.advantages={self.advantages!r} compares the responses to a prompt; "
                "give responses_per_prompt, 2 or more"
            )
        if self.prompts < self.prompts_per_step:
            raise UserError(
                f"PPOConfig.prompts={self.prompts} is less than the {self.prompts_per_step} of a "
                f"step, batch={self.batch} / responses_per_prompt={self.responses_per_prompt}"
            )
        if not 0 < self.gae_decay <= 1 or not 0 < self.discount <= 1:
            raise UserError("PPOConfig.gae_decay and PPOConfig.discount must be in (0, 1]")

    @property
    def steps(self) -> int:
        """Optimisation steps on fresh episodes in the whole run."""
        return self.passes * (self.prompts // self.prompts_per_step)

    @property
    def prompts_per_step(self) -> int:
        return self.batch // self.responses_per_prompt

    @property
    def has_critic(self) -> bool:
        """Whether a value head is trained."""
        return self.advantages == "gae"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation (Rafailov et al., 2023) of every weight, on the pairs."""

    beta: float = 0.1  # reward per nat
    learning_rate: float = 5e-6
    warmup_fraction: float = 0.1  # of the steps; the rate then falls linearly to zero
    clip_norm: float = 1.0
    batch_pairs: int = 8
    forward_pairs: int = 4  # in a forward and backward pass
    epochs: int = 1
    train_pairs: int | None = None  # None: all there are
    validation_pairs: int | None = 200
    max_tokens: int = 512  # of prompt and reply together; the prompt is cut to fit
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "beta", "learning_rate", "clip_norm", "batch_pairs", "forward_pairs")
        check_positive(self, "epochs", "train_pairs", "validation_pairs", "max_tokens")
        check_tokens(self, "forward_pairs", "max_tokens")
        check_fraction(self, "warmup_fraction")
        check_seed(self)
        if self.batch_pairs % self.forward_pairs:
            raise UserError(
                f"DPOConfig.batch_pairs={self.batch_pairs} is not a multiple of "
                f"forward_pairs={self.forward_pairs}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Comparison of the pretrained and the tuned policies on prompts nobody trained on."""

    prompts: int = 200
    responses_per_prompt: int = 4  # of every policy
    best_of: int = 64  # samples of the pretrained policy, of which the reward chooses one
    rated_prompts: int = RATED_PROMPTS  # of them, shown for rating by hand
    response_tokens: int | None = None  # longest response; None: as in training
    batch: int = 200  # responses that are sampled at a time
    temperature: float = 1.0
    resamples: int = 10_000  # of the bootstrap; at most 2,000 for gains at like length
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "prompts", "rated_prompts", "batch", "resamples", "temperature")
        check_positive(self, "response_tokens", "responses_per_prompt", "best_of")
        check_seed(self)
        if self.response_tokens is not None:
            check_tokens(self, "batch", "response_tokens")
        if self.prompts < self.rated_prompts:
            raise UserError("EvaluationConfig.prompts must not be less than rated_prompts")


def lora_config(stored: Mapping[str, Any] | None) -> LoRAConfig | None:
    """The adapters' part of a configuration that was read from a run."""
    return stored and LoRAConfig(**stored | {"targets": tuple(stored["targets"])})


def ppo_config(stored: Mapping[str, Any]) -> PPOConfig:
    """A PPO configuration that was read from a run."""
    return made(PPOConfig, stored | {"lora": lora_config(stored.get("lora"))}, "the run's config")


def with_lora(cfg: PPOConfig, **changes) -> PPOConfig:
    """The LoRA variant of a PPO configuration; only what is named differs."""
    return dataclasses.replace(cfg, lora=LoRAConfig(), **changes)
