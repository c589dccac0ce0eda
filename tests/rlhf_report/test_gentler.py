"""The trial of gentler settings: what differs, and what its table says of the ratings."""

import dataclasses
import runpy

import pytest

from experiment_runs.run import ensure
from experiment_runs.settings import PROJECT
from rlhf_jax import profiles
from rlhf_jax.ratings.store import CRITERIA, RATINGS, response_hash, save_rating
from rlhf_report import gentler

STUDY = profiles.profile("study")
ATTEMPTS = runpy.run_path(str(PROJECT / "examples" / "gentler_settings.py"))["attempts"]
GAIN = {"value": 1.0, "low": 0.5, "high": 1.5}


def test_every_setting_changes_one_thing_of_the_variant():
    first, last = ATTEMPTS(STUDY)
    for cfg in [*first.others.values(), last.lora]:
        own, base = dataclasses.asdict(cfg), dataclasses.asdict(STUDY.lora)
        assert len([name for name in own if own[name] != base[name]]) == 1
    assert first.lora == STUDY.lora and {first.ppo, last.ppo} == {STUDY.ppo}
    assert last.evaluation.temperature == last.lora.temperature == 0.7


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """An evaluation of the variant as it is, rated 3 as the pretrained policy is, and of one with
    another rate, rated 2."""
    monkeypatch.setattr(gentler, "RESULTS", tmp_path)
    inputs = {}
    for name, changes in {"ppo-lora": {}, "ppo-rate": {"learning_rate": 1e-6}}.items():
        folder = tmp_path / ("gentler" if changes else "reference")
        cfg = dataclasses.replace(STUDY.lora, **changes)
        made = ensure(name, cfg, lambda run: run.finish(), inputs={}, root=folder)
        inputs[name] = made.identity
    ratings = {"pretrained": 3, "ppo-lora": 3, "ppo-rate": 2}

    def evaluate(run):
        for name in ratings:
            for i in range(8):
                run.sample(
                    step=0, prompt_id=i, model=name, prompt="?", response=f"{name} {i}", reward=1.0
                )
        own = {"kl_per_sequence": 2.0, "perplexity": 20.0, "ended": 0.5}
        gain = {"reward": GAIN, "second_reward": GAIN}
        run.finish(policies=dict.fromkeys(ratings, own), gains=dict.fromkeys(inputs, gain))

    run = ensure("evaluate", STUDY.evaluation, evaluate, inputs=inputs, root=tmp_path / "gentler")
    for row in run.samples():
        scores = dict.fromkeys(CRITERIA, ratings[row["model"]])
        key = response_hash(row["prompt"], row["response"])
        save_rating(run.path / RATINGS, key, "A. I.", "ai", scores)
    return run


def test_a_policy_that_is_rated_lower_is_told_and_one_as_high_is_not(trial):
    assert [run.path for run in gentler.evaluations()] == [trial.path]
    rows = gentler.table([trial]).set_index("policy")
    assert [*rows["rating"]] == [3, 3, 2]
    assert rows["change"]["LoRA, rate 1e-06"] == "-1.00 [-1.00, -1.00]"
    assert rows["change"]["pretrained"] == "–"
    assert gentler.reading([trial]).endswith(
        "not to be told from it: “LoRA”; below it: “LoRA, rate 1e-06”."
    )


def test_without_ratings_the_table_still_stands(trial):
    (trial.path / RATINGS).unlink()
    assert gentler.table([trial])["rating"].isna().all()
