"""Checkpoints of a training and whole trees of weights, by orbax, each with its checksums."""

import contextlib
import errno
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiment_runs import devices, hosts
from experiment_runs.errors import Stopped, UserError, first_line
from experiment_runs.files import encode, fingerprint, read_json, write_text
from experiment_runs.settings import checkpoint_seconds
from experiment_runs.signals import ASKED

DAMAGED = "damaged"  # folder of states that are passed over; it goes when the run is finished
PASSING = (  # what libraries say of memory and disks that may be well the next time
    "RESOURCE_EXHAUSTED", os.strerror(errno.EIO), os.strerror(errno.ENOMEM),
    os.strerror(errno.EMFILE), os.strerror(errno.ESTALE), os.strerror(errno.EACCES),
)  # fmt: skip
CHECKSUMS = "checksums.json"  # beside the files of saved weights
# What orbax raises becomes one message; its threads would also print it with their tracebacks.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


class Checkpoints:
    """The two latest states of a stage, under its run's `checkpoints` folder.

    Saving is atomic: a killed process leaves the last whole checkpoint. A state that is read must
    have the checksums that it was saved with; one that has not is passed over for the older one.
    """

    def __init__(self, folder: Path, identity: str = ""):
        self.identity = identity  # of the run, whose states alone are read
        self.folder = folder.resolve() / "resume"
        self.every_seconds = checkpoint_seconds()
        self.saved_at = time.monotonic()
        # In the background from an accelerator. On a CPU the writer would hold the very arrays that
        # the next update is to reuse, and the state would be in memory twice.
        background = jax.default_backend() != "cpu"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, create=True, enable_async_checkpointing=background
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        ASKED.heeded = True

    def maybe_save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Saves if the last save is long ago. The notes are small values that JSON can hold.

        Raises:
          Stopped: a signal has come; the state is saved.
        """
        due = ASKED.number or time.monotonic() - self.saved_at >= self.every_seconds
        due = hosts.any_of(bool(due))
        if due and self.manager.latest_step() != step:
            self.save(step, state, notes)
        self.stop_if_asked()

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Saves now.

        Raises:
          FloatingPointError: a value is not finite; what was saved before stays.
          UserError: it cannot be written.
        """
        check_savable(f"step {step}", state)
        own = {"notes": notes, "checksums": checksums(state, notes), "run": self.identity}
        with written(self.folder):
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(own)
                ),
            )
        self.saved_at = time.monotonic()

    def stop_if_asked(self) -> None:
        if hosts.any_of(bool(ASKED.number)):
            self.close()
            raise Stopped(ASKED.number or signal.SIGTERM)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, notes) of the latest checkpoint that is whole; None when there is none.

        Args:
          like: a state of the same shapes, whose arrays also say where to place the restored ones.

        Raises:
          UserError: there are checkpoints, and none is whole, or the latest is another run's.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, notes = self.read(step, like)
            except Exception as error:  # of any kind, whatever byte of a checkpoint is damaged
                if isinstance(error, UserError) or may_pass(error):
                    raise
                damaged[step] = first_line(error)
                continue
            for other, reason in damaged.items():
                print(
                    f"{self.folder}/{other}: damaged ({reason}); it is moved to {DAMAGED}/ there, "
                    f"and the training goes on from step {step}", file=sys.stderr,
                )  # fmt: skip
                if hosts.first():
                    aside = self.folder / DAMAGED / str(other)
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.parent.mkdir(exist_ok=True)
                    (self.folder / str(other)).rename(aside)
            hosts.meet(f"whole checkpoint in {self.folder}")
            self.manager.reload()
            return step, state, notes
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"{self.folder}: no checkpoint is whole ({reasons}); restore one from a copy, or "
                "remove this folder to train this stage from its start"
            )
        return None

    def read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract(like)), notes=ocp.args.JsonRestore()
            ),
        )
        state, own = restored["state"], restored["notes"]
        if own.get("run", self.identity) != self.identity:
            raise UserError(
                f"{self.folder}/{step}: the state of another run, with other settings or inputs; "
                "remove this folder"
            )
        compare(checksums(state, own["notes"]), own["checksums"])
        return state, own["notes"]

    def close(self) -> None:
        ASKED.heeded = False
        with written(self.folder):
            self.manager.wait_until_finished()
            self.manager.close()


def abstract(like: Any) -> Any:
    """Shapes and places in place of arrays; what is NumPy's stays so, and is read as such."""

    def shape(x):
        if isinstance(x, np.ndarray):
            return x
        found = ocp.utils.to_shape_dtype_struct(x)
        if hosts.several() and getattr(x, "is_fully_addressable", True):  # of this process alone
            found = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.whole())
        return found

    return jax.tree.map(shape, like)


def checksums(tree: Any, notes: Any = None) -> dict[str, str]:
    """SHA-256 of every array of a tree by its path, and of the notes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = {jax.tree_util.keystr(path): fingerprint(devices.on_host(leaf)) for path, leaf in leaves}
    return sums | {"notes": fingerprint(encode(notes))}


def may_pass(error: Exception) -> bool:
    """Whether what failed to be read may be whole: memory, the disk or another process has failed,
    not its bytes."""
    passing = isinstance(error, MemoryError) or any(said in str(error) for said in PASSING)
    return passing or hosts.lost(error)


def compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raises ValueError, which names what is not as it was saved."""
    if wrong := sorted(name for name in expected | found if found.get(name) != expected.get(name)):
        raise ValueError(f"{len(wrong)} parts are not as they were saved, the first {wrong[0]}")


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns what a library says when it cannot write into one message.

    Those of orbax, safetensors and tokenizers share no class of errors.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # not of the disk
    except Exception as error:
        if hosts.lost(error):
            raise
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}); make room or name another folder "
            "(RLHF_RESULTS is that of runs), then repeat the command"
        ) from error


def check_savable(where: str, tree: Any) -> None:
    """Stops before anything is saved that is not finite.

    Raises:
      FloatingPointError: names the place, the array and the remedy.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            raise FloatingPointError(
                f"{where}: {jax.tree_util.keystr(path)} is not finite, so that nothing is "
                "saved; the last checkpoint stays. Lower the learning rate"
            )


def save_weights(path: Path, weights: Any, *, step: int | None = None) -> None:
    """Saves a tree of arrays whole or not at all; an older one of that name is replaced.

    Raises:
      FloatingPointError: a value is not finite (`step` says after which); the older one stays.
      UserError: it cannot be written.
    """
    check_savable(str(path) if step is None else f"step {step}", weights)
    path = path.resolve()
    fresh = path.with_name(f"{path.name}.new")
    with written(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh, weights, force=True)
        checkpointer.wait_until_finished()
        sums = checksums(weights)
        if hosts.first():
            write_text(fresh / CHECKSUMS, encode(sums))
    swap(path)


def load_weights(path: Path, like: Any) -> Any:
    """Loads what `save_weights` saved.

    Args:
      path: the checkpoint.
      like: a tree of the same shapes, arrays or abstract. What is bound to devices is read onto
        them; what is not may go to any mesh, as an array that was just made.

    Raises:
      UserError: there is nothing (committed runs come without weights), or it is damaged.
    """
    path = path.resolve()
    hosts.meet(f"reading of {path}")
    if not path.exists() and (path.with_name(f"{path.name}.new") / CHECKSUMS).exists():
        swap(path)  # killed between the two renames of a save
    if not path.exists():
        raise UserError(f"{path}: no weights there; train the run on this machine first")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(path, abstract(like))
        compare(checksums(weights), read_json(path / CHECKSUMS))
    except Exception as error:  # of any kind, whatever byte of the weights is damaged
        if may_pass(error):
            raise
        raise UserError(
            f"{path}: damaged ({first_line(error)}); restore it from a copy, or remove "
            f"{path.parent.parent} to train this stage again"
        ) from error
    leaves, structure = jax.tree.flatten(weights)
    del weights  # so that no more than one array is there twice
    for number, given in enumerate(jax.tree.leaves(like)):
        if not getattr(given, "committed", True):
            leaves[number] = jnp.asarray(np.asarray(leaves[number]))
    return structure.unflatten(leaves)


def swap(path: Path) -> None:
    """Moves a finished `<name>.new` into the place of `<name>`."""
    if hosts.first():
        shutil.rmtree(path, ignore_errors=True)
        path.with_name(f"{path.name}.new").rename(path)
    hosts.meet(f"swap of {path}")
