"""The table of all benchmarks, of answers that are made up."""

from pathlib import Path

import bench
import turns

FOLDER = Path(bench.__file__).parent


def test_ours_is_compared_turn_by_turn_with_the_faster_of_the_peer_s_sides():
    seconds = {
        "jax mixed": [1.0, 2.0, 1.0], "jax float32": [2.0, 2.0, 2.0],
        "torch bfloat16": [2.0, 5.0, 3.0], "torch float32": [9.0, 9.0, 9.0],
    }  # fmt: skip
    answers = {
        side: [{"seconds": value, "memory": 1.0 + side.startswith("torch")} for value in own]
        for side, own in seconds.items()
    }
    speeds = {"work, 1/s": lambda a: 1 / a["seconds"]}
    told = turns.over_faster(answers, speeds)
    assert "jax mixed / torch bfloat16: 2.5 (2 to 3)" in told and "torch float32" not in told
    heads, _, line = bench.table(turns.summary(answers, speeds)).splitlines()
    cells = dict(zip(heads.split(" | "), line.split(" | "), strict=True))
    assert cells["mixed, times"] == "2.5 (2 to 3)"
    assert cells["float32, times"] == "1.5 (1 to 2.5)"
    assert cells["memory, times less |"] == "2 |"


def test_the_peer_s_side_needs_neither_jax_nor_this_project():
    """It runs on an environment of its own, with `turns` beside it."""
    for name in ("bench_reward", "bench_ppo", "bench_gan", "transformers_ppo", "turns"):
        text = (FOLDER / f"{name}.py").read_text()
        foreign = ("import jax", "from rlhf_jax", "from gan_jax", "from experiment_runs")
        assert not [line for line in text.splitlines() if line.startswith(foreign)], name
