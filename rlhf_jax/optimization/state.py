"""The train state, its compiled programs and what must stay finite."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from experiment_runs.devices import replicated, sharded
from experiment_runs.process import release_memory
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.pretrained.tensor_names import leaf_name


class TrainState(NamedTuple):
    """What an update changes, and nothing else."""

    trainable: nnx.State
    opt_state: optax.OptState
    step: jax.Array


def initial_state(trainable: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with arrays of its own: updates consume them."""
    own = sharded(trainable, RULES, own=True)
    step = replicated(np.zeros((), np.int32))
    return TrainState(own, sharded(optimizer.init(own), RULES), step)


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


def check_finite(step: int, **values: float) -> None:
    """Stops a stage at the first value that is not finite.

    Raises:
      FloatingPointError: names step and value.
    """
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}; lower the learning rate")
