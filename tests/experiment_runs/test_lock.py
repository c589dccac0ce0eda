"""Two processes at once: one trains, the other waits or is told; a kill frees the lock."""

import concurrent.futures
import errno
import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment_runs import lock, run
from experiment_runs.errors import UserError
from experiment_runs.lock import locked

PROJECT = Path(__file__).resolve().parent.parent.parent
TRAINING = """
import dataclasses, sys, time
from pathlib import Path
from experiment_runs.run import ensure

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1

def train(run):
    run.rewind(0)
    for step in range(1, 21):
        run.log(step=step, loss=1 / step)
        while not Path(sys.argv[1]).with_name("others-wait").exists():
            time.sleep(0.02)
    run.finish(steps=len(run.metrics()), last=float(run.metrics()["loss"].iloc[-1]))

ensure("stage", Config(), train, inputs={}, root=Path(sys.argv[1]))
"""
HOLDING = """
import sys, time
from pathlib import Path
from experiment_runs.lock import locked
with locked(Path(sys.argv[1]), wait=True):
    print("held", flush=True)
    time.sleep(60)
"""


def start(script, path):
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)], cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def held(tmp_path):
    """The path of a lock that another process holds, and that process."""
    process = start(HOLDING, tmp_path / "lock")
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "lock", process
    process.kill()
    process.communicate()


def test_two_trainings_of_one_run_are_one_training(tmp_path):
    results = tmp_path / "results"
    first = start(TRAINING, results)
    while not [*results.glob("*/metrics.jsonl")]:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    others = [start(TRAINING, results) for _ in range(2)]
    for process in others:
        assert any("waiting for process" in line for line in process.stderr)
    (tmp_path / "others-wait").touch()
    errors = [process.communicate(timeout=120)[1] for process in (first, *others)]
    assert [process.returncode for process in (first, *others)] == [0, 0, 0], errors
    (found,) = results.iterdir()
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert run.Run(found).summary == {"steps": 20, "last": 1 / 20}
    assert len((found / "times.jsonl").read_text().splitlines()) == 1


def test_who_does_not_wait_is_told_for_whom(held):
    path, process = held
    with (
        pytest.raises(UserError, match=f"process {process.pid} on .*wait until it has ended"),
        locked(path, wait=False),
    ):
        pytest.fail("two hold the lock")


def test_a_kill_frees_the_lock(held):
    path, process = held
    process.kill()
    process.wait()
    with locked(path, wait=False):
        assert f"process {process.pid} " not in path.read_text()


def test_where_the_file_system_knows_no_locks_this_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", wait=False):
        assert "this file system knows no locks" in capsys.readouterr().err


def test_only_the_first_process_of_a_job_holds_the_lock(held, monkeypatch):
    path, _ = held
    met = []
    monkeypatch.setattr(lock.hosts, "first", lambda: False)
    monkeypatch.setattr(lock.hosts, "meet", met.append)
    with locked(path, wait=False):
        assert met == [f"lock of {path}"]


def test_who_waits_while_the_folder_is_removed_holds_the_lock_of_the_new_one(tmp_path):
    """The file that it waited for is gone; one that starts anew would hold another."""
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    process = start(HOLDING, path)
    assert process.stdout.readline() == "held\n"

    def end():
        time.sleep(0.2)  # until this one waits; where it does not yet, the test is only weaker
        path.unlink()
        path.parent.rmdir()
        process.kill()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(end)
        with locked(path, wait=True), path.open("a") as own, pytest.raises(BlockingIOError):
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.communicate()
