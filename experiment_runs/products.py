"""Matrix products whose operands may be in another precision than what goes in and comes out."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from experiment_runs import devices


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*rows inputs"],
    kernel: Float[Array, "outputs inputs"],
    products: str | None = None,
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel.T` with its gradient as two plain matrix products.

    Operands have the dtype `products`, by default that of x, which the result always has. The
    kernel's gradient keeps the kernel's own precision, in which it is added up.

    JAX's own rule contracts over batch and time at once and transposes the result, which XLA
    turns into a product of two transposed copies: 1.3 times the time of a whole step on a CPU.
    """
    products = products or x.dtype
    return product("...i,oi->...o", x.astype(products), kernel.astype(products), x.dtype)


def _matmul_forward(x, kernel, products):
    return matmul(x, kernel, products), (x.astype(products or x.dtype), kernel)


def _matmul_backward(products, saved, d_y):
    (x, kernel), dtype = saved, d_y.dtype
    d_y = d_y.astype(x.dtype)
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
    d_kernel = product("or,ri->oi", d_rows.T, rows, kernel.dtype)
    return product("...o,oi->...i", d_y, kernel.astype(x.dtype), dtype), d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)
