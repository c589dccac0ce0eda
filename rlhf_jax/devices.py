"""Placement on devices: all that tells one from many."""

import functools
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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
