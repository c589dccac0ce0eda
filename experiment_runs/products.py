"""Matrix products whose operands may be in another precision than what goes in and comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, UInt32

from experiment_runs import devices

CUT = 16  # last bits of a number in float32, which one in bfloat16 does not have
SIGN = np.uint32(2**31)
GOLDEN = np.uint32(0x9E3779B9)  # odd, and sets rows far apart: 2**32 by the golden ratio


def product(axes: str, left: Array, right: Array, dtype: str | jnp.dtype = "float32") -> Array:
    """A product of two matrices by the rule of einsum, added up in float32.

    A CPU multiplies bfloat16 fast only where operands and result lie row by row and what is summed
    over comes last on the left; XLA multiplies others in float32, or not at all. It would rather
    read a transposed array where it lies, so that here every array is laid out. What is divided
    over several devices would be gathered for that: there the same numbers are multiplied in
    float32.
    """
    if left.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return jnp.einsum(axes, left, right, preferred_element_type=dtype)
    if devices.parted():
        return jnp.einsum(axes, in_float32(left), in_float32(right)).astype(dtype)
    found = jnp.einsum(axes, in_rows(left), in_rows(right), preferred_element_type=jnp.float32)
    return in_rows(found).astype(dtype)


def in_rows(x: Array) -> Array:
    """The array written out row by row."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def in_float32(x: Array) -> Array:
    """The same numbers; XLA would leave out a rounding that is followed by a conversion alone."""
    rounded = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), rounded.nexp, rounded.nmant)


def dithered(
    weights: Float[Array, "*layers rows columns"],
    dtype: str | jnp.dtype,
    rows: Int[Array, "*layers rows"] | None = None,
) -> Float[Array, "*layers rows columns"]:
    """Trained weights as they are multiplied: each is one of the two numbers of bfloat16 beside
    it, the nearer one more probably, by a draw that belongs to its place and its sign.

    A step of the optimizer, however small, then moves the rounded weights as far as itself, on
    average over a matrix. To nearest, weights that are numbers of bfloat16, as those of most
    checkpoints, would not move before half of the distance to the next one. The price is an error
    of up to the whole distance, for weights that lie anywhere twice the variance. Numbers of
    bfloat16 stay what they are, and equal matrices stay equal: a policy begins as its reference.

    Stochastic rounding (Gupta et al., 2015, section 3) whose draws are kept.

    Args:
      weights: matrices in float32; what is in `dtype` already stays.
      dtype: float32 or bfloat16, of the operands of products.
      rows: numbers of the rows, where they were taken out of a larger matrix.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or weights.dtype == jnp.bfloat16:
        return weights.astype(dtype)
    return rounded_by_place(weights, rows)


@jax.custom_jvp
@jax.jit
def rounded_by_place(weights: Array, rows: Array | None) -> Array:
    """`dithered` in bfloat16: a draw is added to the bits that are cut off, and carries or not."""
    shape, last = weights.shape, weights.ndim - 1
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (last - 1, last))
    if rows is not None:
        row = jnp.broadcast_to(rows.astype(jnp.uint32)[..., None], shape)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32)
    # The sign is in it from the first: XLA would make draws that have nothing to do with the
    # weights ahead of a loop and keep them, twice as large as what is rounded.
    place = ((bits & SIGN) ^ row) * GOLDEN + column
    draw = jnp.where(jnp.isfinite(weights), scattered(place) >> CUT, 0)
    bits = (bits + draw) >> CUT
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


@rounded_by_place.defjvp
def _rounded_gradient(primals, tangents):
    return rounded_by_place(*primals), tangents[0].astype(jnp.bfloat16)


def scattered(x: UInt32[Array, "*axes"]) -> UInt32[Array, "*axes"]:
    """Numbers that look drawn, one for each number: how MurmurHash3 ends."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*rows inputs"],
    kernel: Float[Array, "outputs inputs"],
    products: str | None = None,
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel.T` with its gradient as two plain matrix products.

    Operands have the dtype `products`, by default that of x, which the result always has; the
    kernel is `dithered`. Its gradient keeps the kernel's own precision, in which it is added up.

    JAX's own rule contracts over batch and time at once and transposes the result, which XLA
    turns into a product of two transposed copies: 1.3 times the time of a whole step on a CPU.
    """
    products = products or x.dtype
    return product("...i,oi->...o", x.astype(products), dithered(kernel, products), x.dtype)


def _matmul_forward(x, kernel, products):
    return matmul(x, kernel, products), (x.astype(products or x.dtype), kernel)


def _matmul_backward(products, saved, d_y):
    (x, kernel), dtype = saved, d_y.dtype
    d_y = d_y.astype(x.dtype)
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_kernel = product("or,ri->oi", d_rows.T, rows, kernel.dtype)
    return product("...o,oi->...i", d_y, dithered(kernel, x.dtype), dtype), d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)
