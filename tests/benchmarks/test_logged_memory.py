"""The memory model beside what runs on a GPU have logged."""

import programs
import pytest

from experiment_runs.files import read_jsonl
from experiment_runs.settings import PROJECT
from rlhf_jax.memory import Memory
from rlhf_jax.profiles import profile


@pytest.mark.parametrize(
    "stage, log",
    [
        ("reward", "results/assignment/reward-ff5233be08/metrics.jsonl"),
        ("ppo-full: update", "results/measured/ppo-full-unfinished.jsonl"),
    ],
)
def test_the_memory_model_is_near_what_was_logged_on_a_gpu(stage, log):
    """SmolLM2 in bfloat16, whose activations have two bytes, with its blocks in a loop."""
    decoder = programs.model("135M", "bfloat16").config
    told = Memory(decoder=decoder, looped=True).stages(profile("assignment"))[stage].total / 1e9
    peak = max(row["peak_memory_gb"] for row in read_jsonl(PROJECT / log))
    assert told == pytest.approx(peak, rel=0.15)
