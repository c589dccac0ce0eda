"""The stages of the report and what each depends on: run or load.

What is asked for comes from the environment, so that the command line, the chapters and Quarto
agree: RLHF_PROFILE, RLHF_MODEL, RLHF_DATA_DIR, and RLHF_RUN to show committed runs instead.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax

from reporting import runs
from reporting.runs import PROJECT, Run, UserError, ensure
from rlhf_jax import config, evaluation, judge, ppo, pretrained, reward
from rlhf_jax.batch import encode_posts, first_pairs
from rlhf_jax.config import PPOConfig, Profile
from rlhf_jax.data import Prompt, load_preferences, load_prompts, posts, top_up
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.source import Source
from rlhf_jax.split import split_posts, split_prompts

FRACTIONS = {"train": 0.75, "validation": 0.1, "test": 0.15}  # of the posts
STAGES = ("reward", "ppo-full", "ppo-lora", "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that belongs to one profile, model and data; each part is made when needed."""

    profile: Profile
    data_dir: Path | None = None
    committed: Path | None = None  # folder of committed runs to show instead of training

    @functools.cached_property
    def model_path(self) -> Path | None:
        return pretrained.find(self.profile.model)

    @functools.cached_property
    def model_identity(self) -> str:
        return pretrained.identity(self.model_path, dtype=self.profile.dtype)

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        return pretrained.load(self.model_path, name=self.profile.model, dtype=self.profile.dtype)

    @functools.cached_property
    def preferences(self):
        """(pairs as a frame, their source)."""
        return load_preferences(self.data_dir)

    @functools.cached_property
    def posts(self) -> dict[str, list]:
        """The posts of each part."""
        cfg = self.profile.reward
        whole = posts(
            self.preferences[0],
            max_pairs_per_post=cfg.max_pairs_per_post,
            min_score_ratio=cfg.min_score_ratio,
            seed=cfg.seed,
        )
        return split_posts(whole, fractions=FRACTIONS, seed=cfg.seed)

    @functools.cached_property
    def prompts(self) -> tuple[list[Prompt], list[Prompt], Source]:
        """(to train on, unseen, their source), topped up with questions where there are few."""
        wanted = self.profile.ppo.prompts
        unseen = self.profile.evaluation.prompts
        found, source = load_prompts(self.data_dir)
        if len(found) < wanted + unseen:
            found, source = top_up(found, source, self.posts["train"], wanted=wanted + unseen)
        train, held_out = split_prompts(
            found, train=min(wanted, len(found) - unseen), evaluation=unseen,
            seed=self.profile.ppo.seed,
        )  # fmt: skip
        return train, held_out, source

    @property
    def sources(self) -> dict[str, Source]:
        return {"preferences": self.preferences[1], "prompts": self.prompts[2]}

    def run(self, stage: str) -> Run:
        """The finished run of a stage; trains it, and what it depends on, where there is none."""
        if self.committed is not None:
            return runs.find(stage, self.committed)
        inputs = {"model": self.model_identity}
        inputs |= {name: source.fingerprint for name, source in self.sources.items()}
        if stage == "reward":
            return self._ensure(stage, self.profile.reward, self._reward, inputs)
        inputs["reward"] = self.run("reward").identity
        if stage in ("ppo-full", "ppo-lora"):
            cfg = self.variant(stage)
            return self._ensure(stage, cfg, functools.partial(self._ppo, cfg=cfg), inputs)
        if stage == "evaluate":
            inputs |= {name: self.run(name).identity for name in ("ppo-full", "ppo-lora")}
            return self._ensure(stage, self.profile.evaluation, self._evaluate, inputs)
        raise UserError(f"stage {stage!r}: unknown; choose one of {', '.join(STAGES)}")

    def _ensure(self, stage: str, cfg, train, inputs: dict[str, str]) -> Run:
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
            about[name] = dataclasses.asdict(dataclasses.replace(source, location=""))
        return ensure(stage, cfg, train, inputs=inputs, about=about)

    def variant(self, stage: str) -> PPOConfig:
        return self.profile.lora if stage == "ppo-lora" else self.profile.ppo

    def judge(self) -> judge.Judge:
        return judge.load(self.run("reward"), self.pretrained)

    def tuned(self) -> evaluation.Decoders:
        """The decoders of both tuned policies."""
        return {
            stage: ppo.tuned_decoder(self.run(stage), self.variant(stage), self.pretrained)
            for stage in ("ppo-full", "ppo-lora")
        }

    def _reward(self, run: Run) -> None:
        cfg = self.profile.reward
        limits = {
            "train": cfg.train_pairs,
            "validation": cfg.validation_pairs,
            "test": cfg.test_pairs,
        }
        parts = {
            name: encode_posts(
                first_pairs(self.posts[name], limit),
                self.pretrained.tokenizer,
                max_tokens=cfg.max_tokens,
            )
            for name, limit in limits.items()
        }
        prompts = [prompt.text for prompt in self.prompts[0][: cfg.reference_samples]]
        reward.train(run, cfg, self.pretrained, parts, prompts)

    def _ppo(self, run: Run, *, cfg: PPOConfig) -> None:
        prompts = [prompt.text for prompt in self.prompts[0]]
        ppo.train(run, cfg, self.pretrained, self.judge(), prompts)

    def _evaluate(self, run: Run) -> None:
        prompts = [prompt.text for prompt in self.prompts[1]]
        evaluation.evaluate(
            run, self.profile.evaluation, self.profile.ppo, self.pretrained, self.judge(),
            self.tuned(), prompts,
        )  # fmt: skip


def default_profile() -> str:
    """The profile of a machine: `assignment` where there is an accelerator."""
    return "cpu" if jax.default_backend() == "cpu" else "assignment"


@functools.cache
def experiment() -> Experiment:
    """The experiment that the environment asks for.

    Raises:
      UserError: a profile, folder or run does not exist.
    """
    profile = config.profile(os.environ.get("RLHF_PROFILE") or default_profile())
    if model := os.environ.get("RLHF_MODEL"):
        profile = dataclasses.replace(profile, model=model)
    data_dir = os.environ.get("RLHF_DATA_DIR")
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(f"DATA_DIR={data_dir}: no such folder; see README.md for its layout")
    committed = os.environ.get("RLHF_RUN")
    if committed and not (PROJECT / "results" / committed).is_dir():
        known = ", ".join(sorted(p.name for p in (PROJECT / "results").iterdir() if p.is_dir()))
        raise UserError(f"RUN={committed}: no folder results/{committed}; there are: {known}")
    return Experiment(
        profile=profile,
        data_dir=Path(data_dir) if data_dir else None,
        committed=PROJECT / "results" / committed if committed else None,
    )
