"""Where errors become messages: one line, one exit code, and what signals do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiment_runs import errors
from experiment_runs.command import concluded
from experiment_runs.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent.parent


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("a.json: bad"), 2, "error: a.json: bad\n"),
        (FloatingPointError("step 3: loss is nan"), 2, "error: step 3: loss is nan\n"),
        (OSError(28, "No space left on device", "/x"), 2, "error: /x: No space left on device;"),
        (MemoryError(), 2, "error: memory is full"),
        (KeyboardInterrupt(), 130, "error: stopped; the same command goes on"),
        (errors.Stopped(signal.SIGTERM), 143, "error: stopped; the same command goes on"),
    ],
)
def test_an_error_is_one_message_and_a_code(error, code, message, capsys, monkeypatch):
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    assert concluded(raising(error)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(message) and shown.count("\n") == 1


def test_tracebacks_stand_behind_a_variable(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_DEBUG", "1")
    assert concluded(raising(UserError("a.json: bad"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        concluded(lambda: 1 / 0)


def test_values_are_cut_in_messages():
    assert len(errors.brief("x" * 10**6)) < 100 and len(errors.brief(10**400)) < 100
    assert len(errors.brief([[["x" * 99] * 99] * 99])) <= 200
    told = str(UserError("a.json: size is " + "9" * 10**6 + "; write a number"))
    assert len(told) < 4000 and told.startswith("a.json: size") and told.endswith("write a number")
    assert errors.first_line(ValueError("one\ntwo")) == "one"
    assert errors.first_line(ValueError()) == "ValueError"


TRAINING = """
import dataclasses, sys, time
from pathlib import Path
import jax.numpy as jnp
from experiment_runs.checkpoints import Checkpoints
from experiment_runs.command import concluded
from experiment_runs.run import ensure

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1

def train(run):
    keeper, start = Checkpoints(run.checkpoints), 0
    if found := keeper.restore({"w": jnp.zeros(3)}):
        start = found[0]
        print("from", start, float(found[1]["w"][0]), flush=True)
    run.rewind(start)
    for step in range(start + 1, 200):
        time.sleep(0.05)
        run.log(step=step)
        print("step", step, flush=True)
        keeper.maybe_save(step, {"w": jnp.full(3, float(step))}, {})
        if start:
            break
    keeper.close()
    run.finish()

sys.exit(concluded(lambda: ensure("stage", Config(), train, inputs={}, root=Path(sys.argv[1]))))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_ends_with_its_code(tmp_path, number, code):
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": PROJECT}
    environment = os.environ | {"RLHF_DEBUG": ""}
    process = subprocess.Popen(command, env=environment, **pipes)
    while process.stdout.readline() != "step 3\n":
        assert process.poll() is None
    time.sleep(0.01)
    process.send_signal(number)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on" in said and "Traceback" not in said
    last = int(rest.split()[-1]) if rest.split() else 3
    again = subprocess.run(command, env=environment, **pipes, timeout=60, check=True)
    assert again.stdout.startswith(f"from {last} {float(last)}\n")
