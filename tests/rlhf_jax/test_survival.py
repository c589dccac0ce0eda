"""Runs that are killed without warning, as `kill -9` or a full memory would do it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from reporting.runs import Run
from rlhf_jax import config, ppo
from rlhf_jax import judge as judges

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parent.parent.parent
KILLS = 10
REWARD = ["--reward.epochs", "6", "--reward.reference-samples", "8"]
LORA = ["--variant", "lora", "--lora.passes", "20"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Small copies in the layout of SHP and OASST1."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def text():
        return " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(5))

    pairs = [
        {
            "post_id": f"p{i}", "domain": "ab"[i % 2], "history": text(), "human_ref_A": text(),
            "human_ref_B": text(), "score_A": 3, "score_B": 1, "labels": 1,
        }
        for i in range(80)
    ]  # fmt: skip
    messages = [
        {
            "message_id": f"m{i}", "parent_id": None, "message_tree_id": f"m{i}", "text": text(),
            "role": "prompter", "lang": "en", "deleted": False,
        }
        for i in range(60)
    ]  # fmt: skip
    for name, rows in (("shp", pairs), ("oasst", messages)):
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "rows.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def start(data_dir, tmp_path_factory):
    """A function that starts the command line in a process of its own."""
    cache = tmp_path_factory.mktemp("cache")

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


def complete(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def lines(results, stage):
    (*_, file) = [None, *results.glob(f"{stage}-*/metrics.jsonl")]
    return file.read_text().count("\n") if file else 0


def kill_at_random(start, results, stage, arguments):
    """Starts the stage again and again and kills it soon after it has logged something."""
    rng = np.random.default_rng(0)
    kills = 0
    while kills < KILLS:
        process = start(results, *arguments, every="0")
        before = lines(results, stage)
        wanted = before + rng.integers(0, 4)
        while process.poll() is None and lines(results, stage) in range(wanted + 1):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    return kills


def only_run(results, stage):
    (path,) = results.glob(f"{stage}-*")
    return Run(path)


def assert_same(found, expected, timeless):
    assert timeless(found).equals(timeless(expected))
    assert found.samples() == expected.samples()


def test_a_reward_model_survives_kills_bit_by_bit(start, model, timeless, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    complete(start(whole, "reward", *REWARD))
    assert kill_at_random(start, killed, "reward", ["reward", *REWARD]) >= 3
    complete(start(killed, "reward", *REWARD))
    found, expected = (only_run(results, "reward") for results in (killed, whole))
    assert_same(found, expected, timeless)
    for name, column in expected.arrays("test_pairs").items():
        np.testing.assert_array_equal(found.arrays("test_pairs")[name], column)
    ours, theirs = (judges.load(run, model).state for run in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_ppo_survives_kills_bit_by_bit(start, model, timeless, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    complete(start(whole, "ppo", *LORA))
    complete(start(killed, "reward"))
    assert kill_at_random(start, killed, "ppo-lora", ["ppo", *LORA]) >= 3
    complete(start(killed, "ppo", *LORA))
    found, expected = (only_run(results, "ppo-lora") for results in (killed, whole))
    assert_same(found, expected, timeless)
    ours, theirs = (
        ppo.tuned_decoder(run, config.tiny().lora, model)[1] for run in (found, expected)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
