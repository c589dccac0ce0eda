"""Frequencies of the rotary embedding, plain and as longer contexts stretch them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from experiment_runs.errors import UserError

# kinds of stretching, and the numbers that each needs beside the length it was trained on
KINDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
LENGTH = "original_max_position_embeddings"
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
Scaling = tuple[tuple[str, Any], ...]  # name and value, so that a configuration can be compared


def rope_scaling(
    config: Mapping[str, Any], *, default: float = 10_000.0, layer_type: str = "full_attention"
) -> tuple[float, Scaling]:
    """Base and stretching of a transformers `config.json`; no stretching is ().

    Args:
      config: in the layout of transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`, for every type of layer where they differ).
      default: the base where none is given.
      layer_type: of the layers that are asked for.

    Raises:
      UserError: the kind is not supported, or a number is missing, not known, or none.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if rope.keys() & {"full_attention", "sliding_attention"}:
        rope = dict(rope.get(layer_type) or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or default
    check_positive({"rope_theta": theta})
    theta = float(theta)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, ()
    if kind not in KINDS:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported; use one of default, "
            f"{', '.join(KINDS)}"
        )
    if kind != "linear" and rope.get(LENGTH) is None:
        rope[LENGTH] = config.get(LENGTH) or config.get("max_position_embeddings")
    needed = (*KINDS[kind], *(() if kind == "linear" else (LENGTH,)))
    if missing := [name for name in needed if rope.get(name) is None]:
        raise UserError(f"config.json: rope_type {kind!r} needs {missing}")
    check_positive({name: rope[name] for name in needed})
    if unknown := sorted(set(rope) - {*needed, *OPTIONAL, LENGTH}):
        raise UserError(f"config.json: rope_type {kind!r} with {unknown} is not supported")
    kept = {name: value for name, value in rope.items() if value is not None}
    return theta, (("kind", kind), *sorted(kept.items()))


def check_positive(numbers: Mapping[str, Any]) -> None:
    """Refuses what is not a positive number, by name."""
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"config.json: {name}={value!r} must be a positive number")


def local_rope_theta(config: Mapping[str, Any]) -> float:
    """Base in Gemma 3's windowed layers, of a config with its defaults; nothing stretches them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    local = {"sliding_attention": rope.get("sliding_attention")}
    theta, scaling = rope_scaling(
        {"rope_parameters": local, "rope_theta": config["rope_local_base_freq"]},
        layer_type="sliding_attention",
    )
    if scaling:
        raise UserError(
            f"config.json: rope_parameters of sliding_attention: {dict(scaling)} is "
            "not supported; only layers of full_attention are stretched"
        )
    return theta


def rope_frequencies(
    head_dim: int, theta: float, scaling: Scaling = ()
) -> tuple[Float[np.ndarray, "half"], float]:
    """Radians a position of every pair, and the factor of cosines and sines.

    Linear (Chen et al., 2023), by wave length as in Llama 3.1, or yarn (Peng et al., 2023), whose
    ramp and factor are those of transformers.
    """
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    options = dict(scaling)
    kind, factor = options.get("kind"), options.get("factor", 1.0)
    if kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    trained = options[LENGTH]
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = trained * plain / (2 * np.pi)  # in the length that was trained on
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0

    def pair_of(turns):  # that makes so many turns in the length that was trained on
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(options.get("beta_fast", 32)), pair_of(options.get("beta_slow", 1))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretched = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - stretched + stretched / factor), yarn_factor(options)


def yarn_factor(options: Mapping[str, Any]) -> float:
    """What yarn multiplies cosines and sines by."""

    def growth(weight):
        return 1.0 if options["factor"] <= 1 else 0.1 * weight * math.log(options["factor"]) + 1.0

    if options.get("attention_factor") is not None:
        return options["attention_factor"]
    if options.get("mscale") and options.get("mscale_all_dim"):
        return growth(options["mscale"]) / growth(options["mscale_all_dim"])
    return growth(1.0)
