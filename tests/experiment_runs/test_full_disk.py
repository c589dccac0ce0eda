"""Folders that cannot be written and disks that are full: one message, and what is saved stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiment_runs.errors import UserError
from experiment_runs.files import read_jsonl
from experiment_runs.run import ensure
from rlhf_jax.config import LoRAConfig

PROJECT = Path(__file__).resolve().parent.parent.parent
TRAINING = """
import dataclasses, resource, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from experiment_runs.checkpoints import Checkpoints
from experiment_runs.command import concluded
from experiment_runs.run import ensure

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1

def train(run):
    keeper = Checkpoints(run.checkpoints)
    found = keeper.restore({"w": jnp.zeros(9999)})
    start = found[0] if found else 0
    run.rewind(start)
    for step in range(start + 1, 5):
        run.log(step=step, text="x" * 100)
        keeper.maybe_save(step, {"w": jax.random.uniform(jax.random.key(step), (9999,))}, {})
    keeper.close()
    run.finish(steps=step)

if largest := sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest[0]),) * 2)
sys.exit(concluded(lambda: ensure("stage", Config(), train, inputs={}, root=Path(sys.argv[1]))))
"""


def train(*arguments):
    """In a folder, where a second argument says how many bytes a file may hold."""
    return subprocess.run(
        [sys.executable, "-c", TRAINING, *map(str, arguments)], cwd=PROJECT, text=True,
        env=os.environ | {"RLHF_DEBUG": "", "RLHF_CHECKPOINT_SECONDS": "0",
             "JAX_ENABLE_COMPILATION_CACHE": "0",
             "PATH": "/nowhere"},  # no git: its lock would stay
        timeout=120,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_one_message_and_the_run_goes_on_when_it_can(tmp_path):
    for largest in (0, 300, 20_000):  # at once, in the log, in a checkpoint
        stopped = train(tmp_path, largest)
        assert stopped.returncode == 2, stopped.stderr
        assert "Traceback" not in stopped.stderr and "cannot be written" in stopped.stderr
        assert "RLHF_RESULTS" in stopped.stderr
    assert train(tmp_path).returncode == 0
    (folder,) = tmp_path.iterdir()
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["/proc/nobody", "/dev/null", "a" * 300, "/sys/kernel"])
def test_a_results_folder_that_cannot_be_made_is_named_with_the_remedy(where, tmp_path):
    root = tmp_path / where
    with pytest.raises(UserError, match="results cannot be written there .* RLHF_RESULTS"):
        ensure("stage", LoRAConfig(), lambda run: None, inputs={}, root=root)
