"""Runs that are killed without warning, as `kill -9` or a full memory would do it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiment_runs.run import Run
from rlhf_jax import profiles
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.reward_model import model as reward_models

PROJECT = Path(__file__).resolve().parent.parent.parent
KILLS = 10
REWARD = ["reward", "--reward.epochs", "10", "--reward.reference-samples", "8"]  # 240 steps


@pytest.fixture(scope="module")
def start(local_data, tmp_path_factory):
    """A function that starts the command line in a process of its own."""
    cache, data_dir = tmp_path_factory.mktemp("cache"), local_data()

    def run(results, *arguments, every="1000"):
        environment = os.environ | {
            "RLHF_RESULTS": str(results), "RLHF_CHECKPOINT_SECONDS": every, "RLHF_PROGRESS": "",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        options = ["--profile", "tiny", "--data-dir", str(data_dir)]
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_jax", *arguments, *options], cwd=PROJECT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def rewarded(start, tmp_path_factory):
    """Results with a finished reward model, to copy."""
    results = tmp_path_factory.mktemp("rewarded")
    complete(start(results, "reward"))
    return results


def complete(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def lines(results, stage):
    (*_, file) = [None, *results.glob(f"{stage}-*/metrics.jsonl")]
    return file.read_text().count("\n") if file else 0


def kill_at_random(start, results, stage, arguments, times=KILLS):
    """Starts the stage so many times, kills each process at work, and counts the kills.

    A kill comes within five steps and 0.3 seconds, so that the runs outlast them all.
    """
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(times):
        process = start(results, *arguments, every="0")
        wanted = lines(results, stage) + rng.integers(1, 6)
        while process.poll() is None and lines(results, stage) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert not only_run(results, stage).finished
    return kills


def only_run(results, stage):
    (path,) = results.glob(f"{stage}-*")
    return Run(path)


def assert_same(found, expected, timeless):
    assert timeless(found).equals(timeless(expected))
    assert found.samples() == expected.samples()


@pytest.mark.parametrize(
    "times",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(KILLS, marks=pytest.mark.exhaustive)],
)
def test_a_reward_model_survives_kills_bit_by_bit(start, model, timeless, tmp_path, times):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    complete(start(whole, *REWARD))
    assert kill_at_random(start, killed, "reward", REWARD, times) == times
    complete(start(killed, *REWARD))
    found, expected = (only_run(results, "reward") for results in (killed, whole))
    assert_same(found, expected, timeless)
    for name, column in expected.arrays("test_pairs").items():
        np.testing.assert_array_equal(found.arrays("test_pairs")[name], column)
    ours, theirs = (reward_models.load(run, model).state for run in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("variant", "cfg"),
    [("full", profiles.tiny().ppo), ("lora", profiles.tiny().lora)],
    ids=["full", "lora"],
)
def test_ppo_survives_kills_bit_by_bit(start, rewarded, model, timeless, tmp_path, variant, cfg):
    whole, killed = (shutil.copytree(rewarded, tmp_path / name) for name in ("whole", "killed"))
    passes = ["--ppo.passes", "40", "--lora.passes", "40"]  # 120 steps
    arguments = ["ppo", "--variant", variant, *passes]
    complete(start(whole, *arguments))
    assert kill_at_random(start, killed, f"ppo-{variant}", arguments) == KILLS
    complete(start(killed, *arguments))
    found, expected = (only_run(results, f"ppo-{variant}") for results in (killed, whole))
    assert_same(found, expected, timeless)
    ours, theirs = (ppo_training.tuned_decoder(run, cfg, model)[1] for run in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
