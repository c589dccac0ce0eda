"""What every stage shares: the train state, optimizers, checkpoints, placement on devices."""

import functools
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from reporting.runs import UserError, release_memory
from rlhf_jax.pretrained import leaf_name

FROZEN = "frozen"


class TrainState(NamedTuple):
    """What an update changes, and nothing else."""

    trainable: nnx.State
    opt_state: optax.OptState
    step: jax.Array


def initial_state(trainable: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with arrays of its own: updates consume them."""
    own = replicated(jax.tree.map(jnp.copy, trainable))
    return TrainState(own, replicated(optimizer.init(own)), replicated(jnp.zeros((), jnp.int32)))


def optimizer_for(
    groups: dict[str, optax.GradientTransformation],
    group_of: Callable[[tuple], str],
    *,
    clip_norm: float,
) -> optax.GradientTransformation:
    """One optimizer per group of parameters; `frozen` ones are masked: their update is zero.

    The norm that is clipped is that of the parameters that are handed over, so hand over the
    trainable ones only.

    Args:
      groups: optimizers by name.
      group_of: name of a parameter's group, or "frozen", from its path.
      clip_norm: largest norm of all gradients together.
    """

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.partition({**groups, FROZEN: optax.set_to_zero()}, labels),
    )


class Checkpoints:
    """The latest state of a stage, under its run's `checkpoints` folder.

    Saving is atomic: a killed process leaves the last whole checkpoint.
    """

    def __init__(self, folder: Path):
        self.every_seconds = float(os.environ.get("RLHF_CHECKPOINT_SECONDS", "180"))
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


def compiled(function: Any, *arguments: Any, **static: Any) -> Callable[..., Any]:
    """The program of a jitted function for arguments of these shapes.

    Compiling leaves hundreds of megabytes behind, which are given back before the program runs.
    """
    program = function.lower(*arguments, **static).compile()
    release_memory()
    return program


def parameter_counts(params: Any) -> dict[str, int]:
    """How many numbers each part holds; layers of one kind are counted together."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"\.\d+\.", ".*.", leaf_name(path))
        counts[name] = counts.get(name, 0) + leaf.size
    return counts


def linear_schedule(peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """A linear rise to `peak`, then a linear fall that would be at zero after the last step."""
    warmup = math.ceil(warmup_fraction * steps)
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)),
         optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))],
        [warmup],
    )  # fmt: skip


def peak_memory_gb() -> float:
    """Most memory in use so far: the accelerator's where there is one, else the process's."""
    if statistics := jax.devices()[0].memory_stats():
        return statistics["peak_bytes_in_use"] / 1e9
    units = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def check_finite(step: int, **values: float) -> None:
    """Stops a stage at the first value that is not finite.

    Raises:
      FloatingPointError: names step and value.
    """
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}; lower the learning rate")


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """All devices in a row. Placement on it is all that tells one device from many."""
    devices = jax.devices()
    return jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(tree: Any) -> Any:
    """Parameters and states: the whole of them on every device."""
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def over_devices(batch: Any) -> Any:
    """Batches: the leading axis divided over the devices, where their number divides it."""

    def place(x):
        axes = PartitionSpec("batch" if x.shape[0] % mesh().size == 0 else None)
        return jax.device_put(x, NamedSharding(mesh(), axes))

    return jax.tree.map(place, batch)
