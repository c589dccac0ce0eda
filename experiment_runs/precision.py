"""The precision of matrix products: the one that is asked for, or what this machine is fast in.

    float32   everything
    mixed     operands of matrix products in bfloat16, sums and all else in float32
    bfloat16  activations as well, for accelerators

What is trained is kept in float32, and so are losses, whatever the precision. Weights are rounded
so that products see steps of the optimizer that are small beside the distance of two numbers of
bfloat16 (`products.dithered`), which benchmarks/rounded_steps.py measures.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from experiment_runs import devices, hosts, settings
from experiment_runs.accelerator import multiplies_bfloat16
from experiment_runs.errors import UserError

FLAGS = ("amx_bf16", "avx512_bf16")  # of processors that multiply bfloat16 faster than float32


def resolved(asked: str = "auto") -> str:
    """float32, mixed or bfloat16, which belongs to a run's identity, for what may be "auto".

    Processes that train together take what the first one's machine is fast in.

    Raises:
      UserError: there is no such precision.
    """
    if asked == "auto":
        asked = settings.precision()
    elif asked not in settings.PRECISIONS:
        known = ", ".join(settings.PRECISIONS)
        raise UserError(f"precision={asked}: unknown; say one of {known}")
    if asked != "auto":
        return asked
    return fast_on_first() if hosts.several() else fast()


def fast() -> str:
    """What this machine is fast in."""
    if jax.default_backend() != "cpu":
        return "bfloat16" if multiplies_bfloat16() else "float32"
    return "mixed" if fast_flag() else "float32"


@functools.cache
def fast_on_first() -> str:
    """What the first process's machine is fast in; all must ask."""
    number = hosts.of_first(np.asarray(settings.PRECISIONS.index(fast())))
    return settings.PRECISIONS[int(number)]


def fast_flag() -> str | None:
    """The flag by which the processor says that it multiplies bfloat16, as Linux shows it."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return next((flag for flag in FLAGS if flag in said), None)


def told(precision: str) -> str:
    """A precision in words, for the log."""
    processor = jax.default_backend() == "cpu"
    flag = fast_flag() if processor else None
    if processor and devices.mesh().size > 1:  # whose arrays cannot be laid out row by row
        rounds = ": operands rounded to bfloat16, multiplied in float32 on several devices"
        return precision + rounds * (precision != "float32")
    if precision == "mixed":
        has = f"the processor has {flag}" if flag else "which is slow without amx_bf16, avx512_bf16"
        has = f" ({has})" if processor else ""
        return f"mixed: products in bfloat16, the rest in float32{has}"
    if precision == "bfloat16" and processor:
        return "bfloat16 (for accelerators; on a processor mixed rounds less)"
    if precision == "float32" and flag:
        return f"float32 (the processor has {flag}: mixed is faster)"
    return precision


def matmul_precision() -> str:
    """How products of float32 arrays are computed, where no operation says it itself.

    "default" is TF32, with ten bits of mantissa, on NVIDIA cards since Ampere, and float32
    elsewhere; JAX_DEFAULT_MATMUL_PRECISION=highest asks for float32 everywhere.
    """
    return jax.config.jax_default_matmul_precision or "default"


def check_32_bits() -> None:
    """Stops where JAX would compute in 64 bits, of which nothing here has been tested.

    Raises:
      UserError: says how to switch it off.
    """
    if jax.config.jax_enable_x64:
        raise UserError(
            "JAX_ENABLE_X64 is on, which makes float64 of random draws and constants: everything "
            "here is computed in float32 and bfloat16. Unset it, or train within "
            "jax.enable_x64(False)"
        )
