"""Runs that look as those of the assignment's profile do, without any training."""

import dataclasses

import numpy as np
import pytest

from experiment_runs.assignment import PROTOCOL
from experiment_runs.run import ensure
from gan_jax.config import PROFILES
from rlhf_jax import profiles
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.ratings.store import CRITERIA, RATINGS, response_hash, save_rating

MODELS = ("pretrained", "ppo-full", "ppo-lora")
SOURCES = {
    name: {"kind": "hub", "name": asked, "fingerprint": "0123"}
    for name, asked in PROTOCOL["data"].items()
}


@pytest.fixture(scope="session")
def made_runs():
    return make_runs


def make_runs(folder, seed=0, found=None, **changes):
    """Finished runs of the assignment's profile, as far as a submission carries them; a change is
    of a field of a stage's configuration, and `found` of what a stage's summary says."""
    profile = profiles.profile("assignment")
    configs = {
        "reward": profile.reward, "second_reward": profile.second_reward, "ppo-full": profile.ppo,
        "ppo-lora": profile.lora, "evaluate": EvaluationConfig(prompts=50, resamples=50, seed=seed),
        "gan": PROFILES["assignment"],
    }  # fmt: skip
    summaries = {
        "reward": {"pairs": {"train": profile.reward.train_pairs}},
        "ppo-full": {"prompts": profile.ppo.prompts}, "ppo-lora": {"prompts": profile.lora.prompts},
        "evaluate": {"prompts": 50}, "gan": {"dataset": "chestmnist", "source": "the file"},
    }  # fmt: skip
    rng = np.random.default_rng(seed)

    def train(run):
        run.log(step=1, kl=0.05)
        if run.stage == "evaluate":
            names = ("reward", "second_reward", "kl", "tokens", "ended")
            columns = [f"{model}.{name}" for model in MODELS for name in names]
            run.save_arrays(
                conversation=np.arange(50) // 2,
                **{column: rng.normal(size=(50, 2)) for column in columns},
            )
            for number, model in enumerate(MODELS * 3):
                run.sample(
                    step=0, prompt_id=number // 3, prompt=f"question {number // 3}", model=model,
                    response=f"answer {number} of {seed}", reward=0.0, read="", rated=True,
                )  # fmt: skip
        run.finish(**summaries.get(run.stage, {}) | (found or {}).get(run.stage, {}))

    runs, upstream = {}, {}
    for stage, cfg in configs.items():
        cfg = dataclasses.replace(cfg, **changes.get(stage.replace("-", "_"), {}))
        inputs = {"dataset": "chestmnist"} if stage == "gan" else {"seed": str(seed)} | upstream
        runs[stage] = ensure(stage, cfg, train, inputs=inputs, about=SOURCES, root=folder)
        upstream = upstream | {stage: runs[stage].identity}
    for number, row in enumerate(runs["evaluate"].samples()):
        scores = {name: 1 + (number * (k + 2)) % 5 for k, name in enumerate(CRITERIA)}
        key = response_hash(row["prompt"], row["response"])
        save_rating(runs["evaluate"].path / RATINGS, key, "Ada", "person", scores)
    return runs
