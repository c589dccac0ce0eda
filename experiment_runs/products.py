"""Matrix products whose operands may be in another precision than what goes in and comes out."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def product(axes: str, left: Array, right: Array, dtype: str | jnp.dtype = "float32") -> Array:
    """A product of two matrices by the rule of einsum, added up in float32.

    A CPU multiplies bfloat16 fast only where operands and result lie row by row and what is summed
    over comes last on the left; XLA multiplies others in float32, or not at all. It would rather
    read a transposed array where it lies, so that here every array is laid out.
    """
    halves = left.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    rows = in_rows if halves else lambda x: x
    return rows(jnp.einsum(axes, rows(left), rows(right), preferred_element_type=dtype))


def in_rows(x: Array) -> Array:
    """The array written out row by row."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


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
