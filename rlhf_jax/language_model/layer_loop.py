"""The way through a decoder's blocks: one after another, or as one loop over stacked weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


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
    return Stacked(definitions[0], jax.tree.map(lambda *own: jnp.stack(own), *states))


def through(
    layers: Layers, function: Callable[..., tuple[Any, Any]], x: Any, *items: Any
) -> tuple[Any, Any]:
    """`x, result = function(block, x, *own)` through all blocks, `own` one of each of the items.

    Args:
      layers: of `arranged`.
      function: what one block does.
      x: goes into the first block.
      items: of each, one for every block, in a sequence or stacked; None is None for each.

    Returns:
      What comes out of the last block, and every block's result: a list, or stacked in a loop.
    """
    if isinstance(layers, Stacked):
        state = layers.state

        def pass_one(x, own):
            weights, own = own
            return function(nnx.merge(layers.definition, weights), x, *own)

        return jax.lax.scan(pass_one, x, (state, items))
    results = []
    items = [[None] * len(layers) if item is None else item for item in items]
    for block, *own in zip(layers, *items, strict=True):
        x, result = function(block, x, *own)
        results.append(result)
    return x, results
