"""The way through a decoder's blocks: one after another, or as one loop over stacked weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiment_runs import devices, settings
from rlhf_jax.language_model.sharding import RULES


class Stacked(NamedTuple):
    """Blocks of one structure as one block whose arrays have a leading axis for the layer."""

    definition: nnx.GraphDef
    state: nnx.State


Layers = Sequence[nnx.Module] | Stacked


def looped() -> bool:
    """Whether blocks are passed in one loop: on accelerators.

    The program is then as large as that of one block, and compiled in a fraction of the time, for a
    copy of the weights a call. On a CPU compiling takes seconds, and the copies would cost more.
    """
    return jax.default_backend() != "cpu"


def arranged(blocks: Sequence[nnx.Module]) -> Layers:
    """The blocks as `through` takes them; outside of loops, for which they do not change."""
    if not looped():
        return blocks
    definitions, states = zip(*map(nnx.split, blocks), strict=True)
    if len(set(definitions)) > 1:
        raise ValueError("blocks of different structure cannot be stacked")
    stacked = jax.tree.map(lambda *own: jnp.stack(own), *states)
    return Stacked(definitions[0], devices.kept(stacked, RULES))


def through(
    layers: Layers,
    function: Callable[..., tuple[Any, Any]],
    x: Any,
    *items: Any,
    gather: bool = True,
) -> tuple[Any, Any]:
    """`x, result = function(block, x, *own)` through all blocks, `own` one of each of the items.

    Args:
      layers: of `arranged`.
      function: what one block does.
      x: goes into the first block.
      items: of each, one for every block, in a sequence or stacked; None is None for each.
      gather: matrices that lie divided over devices are gathered block by block, in the gradient
        once more; otherwise they stay where they are.

    Returns:
      What comes out of the last block, and every block's result: a list, or stacked in a loop.
    """
    if isinstance(layers, Stacked):

        def pass_one(x, own):
            weights, own = own
            return one(layers.definition, function, own, gather)(weights, x)

        return jax.lax.scan(pass_one, x, (layers.state, items))
    results = []
    items = [[None] * len(layers) if item is None else item for item in items]
    for block, *own in zip(layers, *items, strict=True):
        if gather and (devices.parted() or settings.rematerialized()):
            definition, weights = nnx.split(block)
            x, result = one(definition, function, own, gather)(weights, x)
        else:
            x, result = function(block, x, *own)
        results.append(result)
    return x, results


def one(definition: nnx.GraphDef, function: Callable, own: Sequence, gather: bool) -> Callable:
    """`x, result = passed(weights, x)` through one block.

    Where blocks are rematerialised, the gradient keeps only what goes into them; otherwise it keeps
    what it needs, but no gathered matrices.
    """

    def passed(weights, x):
        weights = devices.gathered(weights, RULES) if gather else weights
        return function(nnx.merge(definition, weights), x, *own)

    if not gather:
        return passed
    if settings.rematerialized():
        return jax.checkpoint(passed)
    if not devices.parted():
        return passed
    keep = jax.checkpoint_policies.save_anything_except_these_names(devices.GATHERED)
    return jax.checkpoint(passed, policy=keep)
