"""All that a report is made with, under a name: how much is trained, and how."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from experiment_runs import assignment as protocol
from experiment_runs.configuration import check_positive, check_types, made
from experiment_runs.errors import UserError
from experiment_runs.precision import resolved
from rlhf_jax.config import (
    SMOLLM2,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
    PPOConfig,
    RewardConfig,
    with_lora,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """All that a report is made with. `promise` says what it costs and what to expect."""

    name: str
    promise: str
    time: str  # on two cores
    model: str = SMOLLM2
    # Of matrix products; see `experiment_runs.precision`. "auto": what the machine is fast in.
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    reward: RewardConfig
    second_reward: RewardConfig  # a second one on other posts, which no policy is tuned against
    ppo: PPOConfig
    lora: PPOConfig
    seeds: int = 1  # of both variants; the report shows the first in full, the others as numbers
    others: Mapping[str, PPOConfig] = dataclasses.field(default_factory=dict)  # one run more each
    dpo: DPOConfig | None = None  # the baseline that learns from the pairs directly
    evaluation: EvaluationConfig

    def __post_init__(self):
        check_types(self)
        check_positive(self, "seeds")
        length = self.evaluation.response_tokens or self.ppo.response_tokens
        dataclasses.replace(self.evaluation, response_tokens=length)  # checks a batch of those
        for field in ("max_pairs_per_post", "min_score_ratio"):
            if getattr(self.second_reward, field) != getattr(self.reward, field):
                raise UserError(
                    f"Profile.second_reward.{field}={getattr(self.second_reward, field)} must be "
                    f"the reward model's, {getattr(self.reward, field)}: both learn from parts of "
                    "the same posts"
                )

    @property
    def dtype(self) -> str:
        """The precision on this machine."""
        return resolved(self.precision)

    @property
    def policies(self) -> dict[str, PPOConfig]:
        """Every policy that is tuned, by the name of its stage."""
        seeds = {
            f"{name}-{number}": dataclasses.replace(cfg, seed=cfg.seed + number)
            for number in range(1, self.seeds)
            for name, cfg in self.variants.items()
        }
        return {**self.variants, **seeds, **self.others}

    @property
    def variants(self) -> dict[str, PPOConfig]:
        return {"ppo-full": self.ppo, "ppo-lora": self.lora}

    @property
    def different_policies(self) -> dict[str, PPOConfig]:
        """Those that differ by more than a seed."""
        return {**self.variants, **self.others}


def second_reward_config(cfg: RewardConfig, **changes) -> RewardConfig:
    """The configuration of the reward model that only evaluates."""
    return dataclasses.replace(cfg, seed=cfg.seed + 1, **changes)


def tiny() -> Profile:
    ppo = PPOConfig(
        learning_rate=1e-3, batch=8, forward_batch=4, passes=1, inner_epochs=2, prompts=24,
        prompt_tokens=48, response_tokens=12, sample_every=1,
    )  # fmt: skip
    reward = RewardConfig(
        learning_rate=1e-3, epochs=2, train_pairs=48, validation_pairs=24, test_pairs=48,
        max_tokens=1024,  # bytes
        reference_samples=8, reference_prompt_tokens=48, reference_response_tokens=12,
    )  # fmt: skip
    return Profile(
        name="tiny",
        promise="random weights and a few rows: shows that everything runs, and nothing else",
        time="a minute",
        model="random",
        precision="float32",  # its products are too small to gain anything
        reward=reward,
        second_reward=second_reward_config(reward, train_pairs=24),
        ppo=ppo,
        lora=with_lora(ppo, learning_rate=2.5e-2),
        dpo=DPOConfig(learning_rate=1e-4, train_pairs=24, validation_pairs=12, max_tokens=1024),
        evaluation=EvaluationConfig(
            prompts=16, responses_per_prompt=2, best_of=4, batch=16, resamples=500
        ),
    )  # fmt: skip


def cpu() -> Profile:
    ppo = PPOConfig(
        learning_rate=5e-5, value_learning_rate=1e-3, warmup_fraction=0.2, batch=16,
        forward_batch=8, passes=1, inner_epochs=2, prompts=192, prompt_tokens=48,
        response_tokens=32, sample_every=2,
        kl_weight=0.15,  # the controller has little time
        missing_end_penalty=0.0,  # hardly any answer can end within so few tokens
    )  # fmt: skip
    reward = RewardConfig(
        epochs=1, batch_rows=3, train_pairs=600, validation_pairs=120, test_pairs=400,
        max_tokens=384, evaluations_per_epoch=3, reference_samples=32,
        reference_prompt_tokens=48, reference_response_tokens=32,
    )  # fmt: skip
    return Profile(
        name="cpu",
        promise=(
            "everything trained for real with small budgets and one seed: a reward model above "
            "chance, and intervals that say whether anything was gained"
        ),
        time="21 minutes (more with posts of a forum, which are longer)",
        reward=reward,
        second_reward=second_reward_config(reward, train_pairs=300, evaluations_per_epoch=1),
        ppo=ppo,
        lora=with_lora(ppo, learning_rate=2.5e-3),
        evaluation=EvaluationConfig(prompts=64, responses_per_prompt=2, best_of=4, batch=64),
    )  # fmt: skip


def study() -> Profile:
    ppo = PPOConfig(
        learning_rate=5e-5, value_learning_rate=1e-3, warmup_fraction=0.1, batch=16,
        forward_batch=8, passes=1, inner_epochs=2, prompts=400, prompt_tokens=64,
        response_tokens=80, kl_weight=0.15,
        missing_end_penalty=0.0,  # many answers are longer
    )  # fmt: skip
    # As many episodes and steps as with a critic, of fewer prompts.
    leave_one_out = dataclasses.replace(
        ppo, advantages="leave-one-out", responses_per_prompt=4, prompts=ppo.prompts // 4
    )
    reward = RewardConfig(
        epochs=1, batch_pairs=16, batch_rows=3, train_pairs=3250, validation_pairs=400,
        test_pairs=1000, evaluations_per_epoch=3, reference_prompt_tokens=64,
        reference_response_tokens=80,
    )  # fmt: skip
    return Profile(
        name="study",
        promise="the smallest run whose claims deserve belief, given real votes and prompts",
        time="several hours",
        reward=reward,
        second_reward=second_reward_config(
            reward, train_pairs=1250, validation_pairs=200, test_pairs=400, evaluations_per_epoch=1
        ),
        ppo=ppo,
        # At higher rates the KL leaves its band.
        lora=with_lora(ppo, learning_rate=1.2e-3),
        others={
            "ppo-leave-one-out": leave_one_out,
            "ppo-group": dataclasses.replace(leave_one_out, advantages="group"),
        },
        seeds=3,
        dpo=DPOConfig(train_pairs=400, max_tokens=384),
        evaluation=EvaluationConfig(prompts=50, rated_prompts=30, response_tokens=128),
    )


def assignment() -> Profile:
    """The protocol as assignment.toml has it."""
    reward, ppo, lora, evaluation = (
        made(kind, protocol.values(part), f"{protocol.PATH}: [protocol.{part}]")
        for part, kind in (
            ("reward", RewardConfig), ("ppo", PPOConfig), ("lora", LoRAConfig),
            ("evaluation", EvaluationConfig),
        )
    )  # fmt: skip
    return Profile(
        name="assignment",
        promise="the protocol to the letter",
        time="several days",
        reward=reward,
        second_reward=second_reward_config(reward),
        ppo=ppo,
        lora=dataclasses.replace(ppo, lora=lora),
        dpo=DPOConfig(),
        evaluation=dataclasses.replace(evaluation, batch=400),
    )


PROFILES = {make.__name__: make for make in (tiny, cpu, study, assignment)}


def profile(name: str) -> Profile:
    """A profile by name.

    Raises:
      UserError: there is none of that name.
    """
    if name not in PROFILES:
        raise UserError(f"PROFILE={name}: unknown; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]()
