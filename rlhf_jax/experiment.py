"""The stages of the report and what each depends on: run or load."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment_runs import inventory, settings
from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from experiment_runs.run import Run, ensure
from experiment_runs.tracking import StepCallback
from rlhf_jax import profiles
from rlhf_jax.baselines import dpo
from rlhf_jax.data.dialogues import Conversation
from rlhf_jax.data.near_duplicates import near_duplicates
from rlhf_jax.data.preferences import Post, load_preferences, posts, posts_fingerprint
from rlhf_jax.data.prompts import Prompt, load_prompts, top_up
from rlhf_jax.data.splits import keys, lost, split_posts, split_prompts
from rlhf_jax.data.tables import Source
from rlhf_jax.evaluation import policies as evaluation
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import read_prompts
from rlhf_jax.profiles import Profile
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.encoding import encode_parts, first_pairs

FRACTIONS = {"train": 0.73, "second_reward": 0.05, "validation": 0.09, "test": 0.13}  # of the posts
REWARD_MODELS = {
    "reward": "train",
    "second_reward": "second_reward",
}  # stages, and the posts that they learn from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that belongs to one profile, model and data; each part is made when needed."""

    profile: Profile
    data_dir: Path | None = None
    pairs_from: str = ""  # folder, file or hub id of the preferences, before `data_dir`
    prompts_from: str = ""  # the same of the prompts
    on_step: StepCallback | None = None  # called with every step that is trained, and its log
    committed: Path | None = None  # folder of committed runs to show instead of training

    @functools.cached_property
    def model_path(self) -> Path | None:
        return hub.find(self.profile.model)

    @functools.cached_property
    def model_identity(self) -> str:
        return hub.identity(self.model_path, dtype=self.profile.dtype)

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        return loading.load(self.model_path, name=self.profile.model, dtype=self.profile.dtype)

    @functools.cached_property
    def preferences(self):
        """(pairs as a frame, their source)."""
        return load_preferences(self.data_dir, self.pairs_from)

    @functools.cached_property
    def division(self) -> tuple[dict[str, list[Post]], dict[str, int]]:
        """(the posts of each part, how many posts, pairs and replies are in none)."""
        cfg = self.profile.reward
        whole = posts(
            self.preferences[0],
            max_pairs_per_post=cfg.max_pairs_per_post,
            min_score_ratio=cfg.min_score_ratio,
            seed=cfg.seed,
        )
        parts = split_posts(whole, fractions=FRACTIONS, seed=cfg.seed)
        return parts, lost(whole, parts)

    @functools.cached_property
    def posts(self) -> dict[str, list]:
        """The posts of each part; "second_reward" also gets what "train" has more than it needs,
        but no text that is trained on."""
        cfg, parts = self.profile.reward, dict(self.division[0])
        used = len(first_pairs(parts["train"], cfg.train_pairs))
        train, left = parts["train"][:used], parts["train"][used:]
        seen = {key for post in train for key in keys(post)}
        more = [post for post in left if seen.isdisjoint(keys(post))]
        return parts | {"train": train, "second_reward": parts["second_reward"] + more}

    @functools.cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt], Source]:
        """(to train on, unseen, their source), topped up with questions where there are few."""
        wanted = max(cfg.prompts for cfg in self.profile.policies.values())
        unseen = self.profile.evaluation.prompts
        found, source = load_prompts(self.data_dir, self.prompts_from)
        if len(found) < wanted + unseen:
            found, source = top_up(found, source, self.posts["train"], wanted=wanted + unseen)
        train, held_out = split_prompts(
            found, train=wanted, evaluation=unseen, seed=self.profile.ppo.seed
        )
        same = near_duplicates([p.text for p in held_out], [p.text for p in train])
        said = f"{same} of {len(held_out)} unseen ones nearly repeat one that is trained on"
        return train, held_out, dataclasses.replace(source, note=f"{source.note}; {said}")

    @property
    def policies(self) -> list[str]:
        """Names of the stages that tune a policy; the first two are the report's variants."""
        if self.committed is None:
            return list(self.profile.policies)
        found = [Run(path.parent).stage for path in self.committed.glob("ppo-*/config.json")]
        return sorted(found, key=lambda name: (name not in ("ppo-full", "ppo-lora"), name))

    @property
    def baselines(self) -> list[str]:
        """Names of the stages that train what PPO is compared with."""
        if self.committed is None:
            return ["dpo"] if self.profile.dpo else []
        return ["dpo"] if any(self.committed.glob("dpo-*/config.json")) else []

    @property
    def stages(self) -> list[str]:
        """All stages in the order in which they depend on each other."""
        return ["reward", "second_reward", *self.policies, *self.baselines, "evaluate"]

    @property
    def sources(self) -> dict[str, Source]:
        pairs, losses = self.preferences[1], self.division[1]
        if any(losses.values()):
            said = (
                f"{losses['replies']} replies, {losses['pairs']} pairs and {losses['posts']} posts "
                "left out, because two parts would share a text"
            )
            pairs = dataclasses.replace(pairs, note="; ".join(filter(None, [pairs.note, said])))
        return {"preferences": pairs, "prompts": self.prompts[2]}

    @functools.cached_property
    def checked(self) -> bool:
        """True once the inputs of all stages have been read, as tokens too.

        Raises:
          UserError: one of them cannot be used, or does not fit the settings.
        """
        model, unseen = self.pretrained, texts(self.prompts[1])
        read = {(self.profile.ppo.prompt_tokens, None): unseen}  # by length and number
        for stage in REWARD_MODELS:
            cfg, parts = getattr(self.profile, stage), self._parts(stage)
            prompts = self.training_texts[: cfg.reference_samples]
            reward_models.check_references(prompts, cfg)
            read[cfg.reference_prompt_tokens, len(prompts)] = prompts
            encode_parts(parts, model.tokenizer, max_tokens=cfg.max_tokens)
        for cfg in self.profile.policies.values():
            ppo_training.check(cfg, model)
            read[cfg.prompt_tokens, cfg.prompts] = self.training_texts[: cfg.prompts]
        for (length, _), prompts in read.items():
            read_prompts(prompts, model.tokenizer, length=length)
        if self.profile.dpo:
            dpo.encoded(self.profile.dpo, model, self._pairs())
        return True

    def run(self, stage: str) -> Run:
        """The finished run of a stage; trains it, and what it depends on, where there is none."""
        if self.committed is not None:
            return inventory.find(stage, self.committed)
        if stage not in self.stages:
            raise UserError(f"stage {stage!r}: unknown; choose one of {', '.join(self.stages)}")
        inputs = {"model": self.model_identity}
        if stage in REWARD_MODELS:
            cfg = getattr(self.profile, stage)
            parts, prompts = self._parts(stage), self.training_texts[: cfg.reference_samples]
            inputs["posts"] = posts_fingerprint(parts)
            inputs["prompts"] = fingerprint(prompts)
            return self._ensure(stage, cfg, inputs, lambda run: reward_training.train_on_posts(
                run, cfg, self.pretrained, parts, prompts
            ))  # fmt: skip
        if stage == "dpo":
            cfg, parts = self.profile.dpo, self._pairs()
            inputs["posts"] = posts_fingerprint(parts)
            return self._ensure(
                stage, cfg, inputs, lambda run: dpo.train(run, cfg, self.pretrained, parts)
            )
        inputs["reward"] = self.run("reward").identity
        if cfg := self.profile.policies.get(stage):
            prompts = self.training_texts[: cfg.prompts]
            inputs["prompts"] = fingerprint(prompts)
            return self._ensure(stage, cfg, inputs, lambda run: ppo_training.train(
                run, cfg, self.pretrained, self.reward_model(), prompts
            ))  # fmt: skip
        prompts = self.prompts[1]
        inputs["prompts"] = fingerprint(
            [*zip(texts(prompts), (prompt.tree_id for prompt in prompts), strict=True)]
        )
        tuned = [*self.policies, *self.baselines]
        inputs |= {name: self.run(name).identity for name in ("second_reward", *tuned)}
        cfg = self.profile.evaluation
        return self._ensure(stage, cfg, inputs, lambda run: evaluation.evaluate(
            run, cfg, self.profile.ppo, self.pretrained,
            {name: self.reward_model(name) for name in REWARD_MODELS},
            {name: functools.partial(self.tuned, name) for name in tuned},
            texts(prompts), [prompt.tree_id for prompt in prompts],
        ))  # fmt: skip

    def _ensure(
        self, stage: str, cfg: Any, inputs: dict[str, str], train: Callable[[Run], None]
    ) -> Run:
        where = self.model_path
        about = {
            "profile": {"name": self.profile.name, "promise": self.profile.promise},
            "model": {
                "name": self.profile.model,
                "file": "random weights" if where is None else where.name,
                "dtype": self.profile.dtype,
            },
        }
        for name, source in self.sources.items():
            about[name] = dataclasses.asdict(source)

        def checked(run: Run) -> None:  # a later stage's inputs too, before the first one's steps
            _ = self.checked
            train(run)

        return ensure(stage, cfg, checked, inputs=inputs, about=about, on_step=self.on_step)

    def reward_model(self, stage: str = "reward") -> reward_models.FrozenRewardModel:
        return reward_models.load(self.run(stage), self.pretrained).for_products()

    def tuned(self, stage: str) -> evaluation.SplitDecoder:
        """The decoder of a tuned policy."""
        if stage == "dpo":
            return dpo.tuned_decoder(self.run(stage), self.pretrained)
        cfg = self.profile.policies[stage]
        return ppo_training.tuned_decoder(self.run(stage), cfg, self.pretrained)

    def _parts(self, stage: str) -> dict[str, list[Post]]:
        """The posts that a reward model is trained, chosen and tested on."""
        cfg = getattr(self.profile, stage)
        wanted = {
            "train": (REWARD_MODELS[stage], cfg.train_pairs),
            "validation": ("validation", cfg.validation_pairs),
            "test": ("test", cfg.test_pairs),
        }
        return {name: first_pairs(self.posts[own], limit) for name, (own, limit) in wanted.items()}

    def _pairs(self) -> dict[str, list[Post]]:
        """The posts that DPO learns from: those of the reward model, as many as it wants."""
        cfg, parts = self.profile.dpo, self._parts("reward")
        limits = {"train": cfg.train_pairs, "validation": cfg.validation_pairs}
        return {name: first_pairs(parts[name], limit) for name, limit in limits.items()}

    @property
    def training_texts(self) -> list[Conversation]:
        """The prompts to train on."""
        return texts(self.prompts[0])


def texts(prompts: list[Prompt]) -> list[Conversation]:
    """What the policies are asked."""
    return [prompt.turns or prompt.text for prompt in prompts]


@functools.cache
def from_environment(profile: str | None = None) -> Experiment:
    """The experiment that the environment asks for; see `experiment_runs.settings`.

    Args:
      profile: its name, in place of the environment's.

    Raises:
      UserError: a profile, folder or run does not exist.
    """
    chosen = profiles.profile(profile or settings.profile())
    if model := settings.model():
        chosen = dataclasses.replace(chosen, model=model)
    if (precision := settings.precision()) != "auto":
        chosen = dataclasses.replace(chosen, precision=precision)
    return Experiment(
        profile=chosen,
        data_dir=settings.data_dir(),
        pairs_from=settings.preferences(),
        prompts_from=settings.prompts(),
        committed=settings.committed(),
    )
