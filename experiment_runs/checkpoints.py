"""Checkpoints of a training and whole trees of weights, by orbax."""

import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiment_runs.errors import UserError
from experiment_runs.settings import checkpoint_seconds


class Checkpoints:
    """The latest state of a stage, under its run's `checkpoints` folder.

    Saving is atomic: a killed process leaves the last whole checkpoint.
    """

    def __init__(self, folder: Path):
        self.every_seconds = checkpoint_seconds()
        self.saved_at = time.monotonic()
        # In the background from an accelerator. On a CPU the writer would hold the very arrays that
        # the next update is to reuse, and the state would be in memory twice.
        background = jax.default_backend() != "cpu"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=background
        )
        self.latest = ocp.CheckpointManager(folder.resolve() / "resume", options=options)

    def maybe_save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Saves if the last save is long ago. The notes are small values that JSON can hold."""
        if time.monotonic() - self.saved_at >= self.every_seconds:
            self.latest.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
                ),
            )
            self.saved_at = time.monotonic()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, notes) of the latest checkpoint; None when there is none.

        Args:
          like: a state of the same shapes, whose arrays also say where to place the restored ones.
        """
        step = self.latest.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self.latest.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
            ),
        )
        return step, restored["state"], restored["notes"]

    def close(self) -> None:
        self.latest.wait_until_finished()
        self.latest.close()


def save_weights(path: Path, weights: Any) -> None:
    """Saves a tree of arrays whole or not at all; an older one of that name is replaced."""
    path = path.resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.with_name(f"{path.name}.new"), weights, force=True)
    swap(path)


def load_weights(path: Path, like: Any) -> Any:
    """Loads what `save_weights` saved.

    Args:
      path: the checkpoint.
      like: a tree of the same shapes, arrays or abstract.

    Raises:
      UserError: there is nothing (committed runs come without weights).
    """
    path = path.resolve()
    fresh = path.with_name(f"{path.name}.new")
    if not path.exists() and fresh.exists():  # killed between the two renames of a save
        swap(path)
    if not path.exists():
        raise UserError(f"{path}: no weights there; train the run on this machine first")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def swap(path: Path) -> None:
    """Moves a finished `<name>.new` into the place of `<name>`."""
    shutil.rmtree(path, ignore_errors=True)
    path.with_name(f"{path.name}.new").rename(path)
