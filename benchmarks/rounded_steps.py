"""How much of an optimizer step products of bfloat16 see: `python benchmarks/rounded_steps.py`.

Weights are kept in float32 and rounded for products. Rounded to nearest, a step that is small
beside the distance of two numbers of bfloat16 is seen where it carries a weight over the middle
between them: on average in full where weights lie anywhere, not at all where they are numbers of
bfloat16, as those of most checkpoints, and too much where they lie in the middle. Where weights are
`dithered`, as here, it is seen in full on average wherever they lie. Adam's first step moves every
weight by the learning rate. Writes results/measured/rounded_steps.txt.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import turns

from experiment_runs.products import dithered

STEPS = (1e-6, 3e-6, 1e-5, 5e-5, 2e-4, 1e-3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default=turns.SMOLLM2)
    options.add_argument(
        "--output", type=Path, default=turns.PROJECT / "results/measured/rounded_steps.txt"
    )
    args = options.parse_args()
    import rlhf_jax

    model = rlhf_jax.load(args.model, precision="float32")
    blocks = [np.asarray(x) for x in jax.tree.leaves(model.state["blocks"]) if x.ndim > 1]
    random = np.random.default_rng(0)
    weights = np.stack([random.choice(x.ravel(), 100_000) for x in blocks])
    kinds = {
        "as they are read": weights,
        "numbers of bfloat16": to_nearest(weights),
        "zeros, as adapters begin": 0 * weights,
        "anywhere": weights * random.uniform(1, 2, weights.shape).astype("float32"),
    }
    sign = random.choice(np.float32([-1, 1]), weights.shape)
    lines = [turns.circumstances(), f"model     {model.name}, {model.origin}", ""]
    lines.append("Move of the rounded weights by the step, in the step's direction, mean of all")
    for title, rounded in (("to nearest", to_nearest), ("dithered, as here", as_here)):
        lines += ["", f"{title:28}" + "".join(f"{step:>9g}" for step in STEPS)]
        for name, own in kinds.items():
            moves = [seen(own, step * sign, rounded) for step in STEPS]
            lines.append(f"{name:28}" + "".join(f"{move:9.2f}" for move in moves))
    turns.keep("\n".join(lines), args.output)


def seen(weights: np.ndarray, steps: np.ndarray, rounded: Callable) -> float:
    """Mean of how far rounded weights move in the direction of steps of one size, by that size."""
    moved = rounded(weights + steps) - rounded(weights)
    return float((moved * np.sign(steps)).mean() / np.abs(steps).mean())


def to_nearest(weights: np.ndarray) -> np.ndarray:
    """The nearest numbers of bfloat16, in float32."""
    return weights.astype(ml_dtypes.bfloat16).astype("float32")


def as_here(weights: np.ndarray) -> np.ndarray:
    """The numbers of bfloat16 that this project multiplies by, in float32."""
    return np.asarray(dithered(jnp.asarray(weights), "bfloat16")).astype("float32")


if __name__ == "__main__":
    main()
