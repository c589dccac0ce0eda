"""Placement on devices: a mesh of data x model axes, and arrays divided over it by rules.

Rows of a batch are divided over `data`. Parameters, gradients and optimizer states are divided over
both axes (fully sharded), by a table of rules that stands beside the parameters' names. A rule is a
pattern of paths with one entry a dimension: the axes that divide it, or None. It says how an array
is kept; how it is used follows: `data` is gathered, for one layer at a time, while `model`, where
it divides first, stays. XLA's partitioner does the rest. On one device nothing of this leaves a
trace in a program.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiment_runs import settings
from experiment_runs.errors import UserError

AXES = ("data", "model")
GATHERED = "gathered"  # what a gradient does not keep, but gathers again
ANY = PartitionSpec.UNCONSTRAINED
Rules = Sequence[tuple[str, tuple[Any, ...]]]


def mesh() -> Mesh:
    """The devices by `data` and `model` as RLHF_MESH has them; all on `data` by default.

    Raises:
      UserError: there are not as many devices, or they are left over.
    """
    return _mesh(settings.mesh())


@functools.cache
def _mesh(asked: str) -> Mesh:
    devices = jax.devices()
    parts = [part.partition("=") for part in asked.split(",") if part.strip()]
    number = re.compile(r" *\d{1,6} *")
    sizes = {name.strip(): int(size) if number.fullmatch(size) else 0 for name, _, size in parts}
    if sizes.keys() - set(AXES) or len(sizes) < len(parts) or not all(sizes.values()):
        raise UserError(f"mesh {asked!r}: write data=4,model=2, each a positive number, or one")
    model = sizes.get("model", 1)
    data = sizes.get("data", max(1, len(devices) // model))
    if data * model > len(devices) or (data * model < len(devices) and jax.process_count() > 1):
        fitting = ", ".join(f"data={len(devices) // n},model={n}" for n in divisors(len(devices)))
        raise UserError(
            f"mesh data={data},model={model} is of {data * model} devices, and there are "
            f"{len(devices)}; these fit: {fitting}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, model), AXES, axis_types=kinds, devices=devices[: data * model])


def placement() -> contextlib.AbstractContextManager:
    """The context in which programs are divided over the mesh."""
    return jax.set_mesh(mesh())


def alone() -> contextlib.AbstractContextManager:
    """The context in which programs are on this process's first device, as those of functions that
    users give must be where one of several processes calls them."""
    return jax.set_mesh(_alone())


@functools.cache
def _alone() -> Mesh:
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1, 1), AXES, axis_types=kinds, devices=jax.local_devices()[:1])


def on_mesh(function: Callable) -> Callable:
    """The function in that context."""

    @functools.wraps(function)
    def within(*arguments: Any, **options: Any) -> Any:
        with placement():
            return function(*arguments, **options)

    return within


def whole() -> NamedSharding:
    """Where an array is whole on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def data_size() -> int:
    """Over how many devices the rows of a batch will be divided; for programs see `rows_parted`."""
    return mesh().shape["data"]


def replicated(tree: Any) -> Any:
    """The whole of every array on every device."""
    return jax.tree.map(lambda x: placed(x, PartitionSpec()), tree)


def over_devices(batch: Any) -> Any:
    """Batches: the leading axis of every array divided over `data`.

    Raises:
      UserError: it cannot be; every device would do the work of all.
    """

    def place(x):
        check_divisible("rows of a batch", len(x))
        return placed(x, PartitionSpec("data"))

    return jax.tree.map(place, batch)


def filled(count: int) -> np.ndarray:
    """Numbers of `count` rows, the first ones again where the last device would have fewer."""
    return np.arange(count + -count % data_size()) % count


def sharded(tree: Any, rules: Rules, *, own: bool = False) -> Any:
    """Parameters and what goes with them, divided over the mesh by their paths.

    Args:
      tree: of arrays.
      rules: the first whose pattern is found in a path counts; without one an array is whole on
        every device.
      own: in arrays of their own, which a program may consume.

    Raises:
      UserError: an array does not divide; the message says which meshes would.
    """
    check_mesh(tree, rules)
    copy = jnp.copy if own else lambda x: x
    return jax.tree_util.tree_map_with_path(
        lambda path, x: copy(placed(x, kept_axes(path, x, rules))), tree
    )


def read_onto(like: Any, read: Callable[[tuple], np.ndarray], rules: Rules) -> Any:
    """A tree read leaf by leaf, each placed as `sharded` does before the next is read; on one
    device bound to none, as an array that was just made.

    Args:
      like: a tree of the same shapes and, in the end, kinds of numbers.
      read: gives the array of a leaf's path.
      rules: as for `sharded`.

    Raises:
      UserError: an array does not divide; the message says which meshes would.
    """
    check_mesh(like, rules)

    def place(path, leaf):
        values, axes = read(path), kept_axes(path, leaf, rules)
        found = jnp.asarray(values) if mesh().size == 1 else placed(values, axes)
        return found.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(place, like)


def on_host(tree: Any) -> Any:
    """All of every array as NumPy's; every process gets all."""

    def fetched(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetched, tree)


def together(tree: Any) -> Any:
    """Every array whole on the first device and bound to none, for what follows a training."""
    return tree if mesh().size == 1 else jax.tree.map(jnp.asarray, on_host(tree))


def placed(x: Any, axes: PartitionSpec) -> jax.Array:
    """An array on the mesh. Of several processes each reads its part of a host's array."""
    sharding = NamedSharding(mesh(), axes)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=sharding)(on_host(jax.random.key_data(x)))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))


def kept_axes(path: tuple, x: Any, rules: Rules) -> PartitionSpec:
    """How an array is kept; its last dimensions are those of the rule."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    for pattern, axes in rules:
        if re.search(pattern, name):
            return PartitionSpec(*(None,) * (np.ndim(x) - len(axes)), *axes)
    return PartitionSpec()


def used_axes(kept: PartitionSpec) -> PartitionSpec:
    """How it is used: what `data` divides is gathered, and with it what is divided inside that."""
    first = (entry[0] if isinstance(entry, tuple) else entry for entry in kept)
    return PartitionSpec(*("model" if axis == "model" else None for axis in first))


# In programs. Outside of `placement`, and on one device, these give back what they get.
def parted() -> bool:
    """Whether the program that is being traced is divided over several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


def rows_parted() -> int:
    """Over how many devices the program that is being traced divides its rows."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def constrained(x: jax.Array, *axes: Any) -> jax.Array:
    """An array whose dimensions are divided over these axes, whole (None), or as it suits (ANY)."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if parted() else x


def kept(tree: Any, rules: Rules) -> Any:
    """Parameters and what goes with them as `sharded` places them."""
    if not parted():
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: constrained(x, *kept_axes(path, x, rules)), tree
    )


def gathered(tree: Any, rules: Rules) -> Any:
    """Parameters as a layer uses them; their gradients are kept as the parameters are."""
    if not parted():
        return tree

    def gather(path, x):
        own = kept_axes(path, x, rules)
        return x if not own else checkpoint_name(_gathered(x, own), GATHERED)

    return jax.tree_util.tree_map_with_path(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x, axes):
    return constrained(x, *used_axes(axes))


_gathered.defvjp(
    lambda x, axes: (_gathered(x, axes), None),
    lambda axes, _, gradient: (constrained(gradient, *axes),),
)


# What does not divide.
def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_divisible(name: str, rows: int, axes: Sequence[str] = ("data",)) -> None:
    """Stops where rows cannot be divided evenly over axes.

    Raises:
      UserError: names the field, its value, and the values and meshes that would do.
    """
    size = math.prod(mesh().shape[axis] for axis in axes)
    if rows % size:
        below = rows // size * size
        values = f"{below} or {below + size}" if below else f"{size}"
        fitting = ", ".join(str(n) for n in divisors(rows) if n <= mesh().size)
        raise UserError(
            f"{name}={rows} cannot be divided over {size} devices; make it {values}, or "
            f"{' x '.join(axes)} one of {fitting} (--mesh, RLHF_MESH)"
        )


def check_mesh(tree: Any, rules: Rules) -> None:
    """Stops where a dimension of a parameter cannot be divided over the axes of its rule.

    Raises:
      UserError: names the parameter and the meshes of as many devices, or fewer, that would do.
    """
    leaves = [
        (path, x.shape, kept_axes(path, x, rules))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]

    def misfit(sizes: dict[str, int]) -> str:
        for path, shape, axes in leaves:
            for length, entry in zip(shape, axes, strict=False):
                names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
                if length % math.prod(sizes[name] for name in names):
                    name = jax.tree_util.keystr(path, simple=True, separator=".")
                    return f"{name.removesuffix('.value')} {list(shape)}: {length} over {names}"
        return ""

    own = dict(mesh().shape)
    if wrong := misfit(own):
        raise UserError(
            f"mesh data={own['data']},model={own['model']} does not divide {wrong}; "
            f"{fitting_meshes(lambda data, model: not misfit({'data': data, 'model': model}))}"
        )


def fitting_meshes(fits) -> str:
    """The meshes of at most as many devices as there are that fit, the largest ones, in words."""
    for count in range(mesh().size, 0, -1):
        found = [(count // n, n) for n in divisors(count) if fits(count // n, n)]
        if found:
            break
    named = ", ".join(f"data={data},model={model}" for data, model in found)
    return f"of {count} devices these do: {named} (--mesh, RLHF_MESH)"
