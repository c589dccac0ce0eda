"""Placement on devices: all that tells one from many."""

import functools
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiment_runs.errors import UserError


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """All devices in a row. Placement on it is all that tells one device from many."""
    devices = jax.devices()
    return jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(tree: Any) -> Any:
    """Parameters and states: the whole of them on every device."""
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def over_devices(batch: Any) -> Any:
    """Batches: the leading axis of every array divided over the devices.

    Raises:
      UserError: it cannot be; every device would do the work of all.
    """

    def place(x):
        check_divisible("rows of a batch", len(x))
        return jax.device_put(x, NamedSharding(mesh(), PartitionSpec("batch")))

    return jax.tree.map(place, batch)


def check_divisible(name: str, rows: int) -> None:
    """Stops where rows cannot be divided evenly over the devices.

    Raises:
      UserError: names the field, its value and the devices.
    """
    if rows % mesh().size:
        raise UserError(
            f"{name}={rows} cannot be divided over {mesh().size} devices; choose a multiple of "
            "that, or fewer devices (CUDA_VISIBLE_DEVICES)"
        )
