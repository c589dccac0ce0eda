"""Optimizers by group of parameters, and the learning rate's schedule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

FROZEN = "frozen"


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


def linear_schedule(peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """A linear rise to `peak`, then a linear fall that would be at zero after the last step."""
    warmup = math.ceil(warmup_fraction * steps)
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)),
         optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))],
        [warmup],
    )  # fmt: skip


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The state of an optimizer whose schedules go on from a step; moments keep their count."""

    def moved(part: Any) -> Any:
        return part._replace(count=step) if scheduled(part) else part

    def scheduled(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(moved, opt_state, is_leaf=scheduled)


def decayed_adam(rate: float | optax.Schedule, decay: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices, and neither norms nor biases."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.adamw(rate, weight_decay=decay, mask=matrices)
