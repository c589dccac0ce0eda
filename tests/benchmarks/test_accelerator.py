"""The protocol in pieces: what starts when, what is stopped, what is taken along."""

import json
import os
import sys
import tarfile

import accelerator
import pytest
from accelerator import Stage


def python(code: str, *after: str):
    return Stage((sys.executable, "-c", code), after)


def run(stages, tmp_path, *, seconds=20.0, gans=2):
    return accelerator.run(stages, tmp_path / "logs", os.environ, seconds=seconds, gans=gans)


def test_a_stage_starts_only_after_what_it_needs(tmp_path):
    made = tmp_path / "made"
    stages = {
        "second": python(f"print(open({str(made)!r}).read())", "first"),
        "first": python(f"import time; time.sleep(0.5); open({str(made)!r}, 'w').write('text')"),
    }
    assert run(stages, tmp_path) == {"second": "finished", "first": "finished"}
    assert (tmp_path / "logs" / "second.log").read_text() == "text\n"


def test_what_needs_a_stage_that_failed_does_not_start_and_the_rest_goes_on(tmp_path):
    stages = {
        "broken": python("raise SystemExit(3)"),
        "needy": python("", "broken"),
        "other": python(""),
    }
    assert run(stages, tmp_path) == {"broken": "failed", "needy": "waiting", "other": "finished"}


def test_nothing_outlives_the_time(tmp_path):
    alive = tmp_path / "alive"
    code = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    assert run({"long": python(code)}, tmp_path, seconds=0.5) == {"long": "stopped"}
    with pytest.raises(ChildProcessError):  # no child is left to wait for
        os.waitpid(-1, 0)
    assert not alive.exists()


def test_so_many_dcgans_train_beside_each_other(tmp_path):
    code = (
        "import pathlib, time; p = pathlib.Path({0!r}); q = p / {1!r}; q.touch(); time.sleep(0.4);"
        "print(len(list(p.glob('gan*')))); q.unlink()"
    )
    (tmp_path / "now").mkdir()
    names = ("gan", "gan-a", "gan-b")
    stages = {name: python(code.format(str(tmp_path / "now"), name)) for name in names}
    assert set(run(stages, tmp_path, gans=1).values()) == {"finished"}
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in names] == ["1\n"] * 3


def test_the_archive_holds_the_small_files_of_runs_and_neither_weights_nor_real_images(tmp_path):
    for name, finished in (("gan-1", True), ("ppo-full-2", False)):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        kept = ["config.json", "metrics.jsonl", "arrays.npz", *["summary.json"] * finished]
        for file in (*kept, "real.npz", "generator.safetensors", "checkpoints/weights.npz"):
            (folder / file).write_text("{}\n")
    accelerator.collect(tmp_path, tmp_path / "runs.tar.gz")
    with tarfile.open(tmp_path / "runs.tar.gz") as tar:
        assert sorted(tar.getnames()) == [
            "gan-1/arrays.npz", "gan-1/config.json", "gan-1/metrics.jsonl", "gan-1/summary.json",
            "unfinished/ppo-full-2/arrays.npz", "unfinished/ppo-full-2/config.json",
            "unfinished/ppo-full-2/metrics.jsonl",
        ]  # fmt: skip


def test_the_table_tells_the_first_step_from_the_others_and_counts_what_was_compiled(tmp_path):
    folder = tmp_path / "reward-1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    rows = [{"step": step, "seconds": seconds} for step, seconds in enumerate((9.0, 1.0, 2.0, 2.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    (tmp_path / "logs").mkdir()
    lines = ("jit(update) in 2.5 sec", "jit(_mean) in 0.25 sec")
    log = "".join(f"Finished XLA compilation of {line}\n" for line in lines)
    (tmp_path / "logs" / "reward.log").write_text(log)
    table = [line.split() for line in accelerator.phases(tmp_path)]
    assert ["reward-1", "seconds", "4", "9", "2", "14", "0"] in table
    assert ["reward", "2", "programs", "2.8"] in table
