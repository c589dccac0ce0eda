"""Convolutions and their transposes, written twice: for accelerators and for a CPU.

XLA's own gradients of convolutions are slow on a CPU: one DCGAN step (batch 64, 32x32 pixels,
widths 64 to 512) took 3.0 s where PyTorch took 0.33 s. There, a convolution is one matrix product
over the image's patches, and its transpose one product to all taps' output columns followed by
overlapping adds. On an accelerator both are `lax.conv_general_dilated`.

Images are (batch, height, width, channels), kernels (kernel, kernel, channels, filters) for both
directions: a kernel of `transposed_convolution` is that of the convolution which it transposes,
so its input has `filters` channels and its output `channels`. `products` is the dtype of the
operands of the products, for a processor that multiplies bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from experiment_runs.products import matmul

Pads = tuple[int, int]  # before and after, the same for height and width


def convolution(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel kernel channels filters"],
    *,
    stride: int,
    padding: Pads,
    products: str = "float32",
) -> Float[Array, "batch rows columns filters"]:
    """Cross-correlation of images and kernel, as in every deep-learning library."""
    if jax.default_backend() == "cpu":
        return convolution_by_products(images, kernel, stride, padding, products)
    return convolution_direct(images, kernel, stride, padding)


def transposed_convolution(
    images: Float[Array, "batch rows columns filters"],
    kernel: Float[Array, "kernel kernel channels filters"],
    *,
    stride: int,
    padding: Pads,
    products: str = "float32",
) -> Float[Array, "batch height width channels"]:
    """Transpose of `convolution`: side (side - 1) * stride + kernel - sum(padding)."""
    if jax.default_backend() == "cpu":
        return transposed_by_products(images, kernel, stride, padding, products)
    return transposed_direct(images, kernel, stride, padding)


def convolution_direct(images, kernel, stride: int, padding: Pads):
    """`convolution` by XLA."""
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def transposed_direct(images, kernel, stride: int, padding: Pads):
    """`transposed_convolution` by XLA."""
    before, after = (kernel.shape[0] - 1 - pad for pad in padding)
    return lax.conv_general_dilated(
        images, kernel[::-1, ::-1], (1, 1), ((before, after), (before, after)),
        lhs_dilation=(stride, stride), dimension_numbers=("NHWC", "HWOI", "NHWC"),
    )  # fmt: skip


def convolution_by_products(images, kernel, stride: int, padding: Pads, products="float32"):
    """`convolution` as one matrix product over the patches, whose operands are in `products`."""
    side, _, channels, filters = kernel.shape
    columns = patches(images, side, stride, padding)
    matrix = in_cells(kernel, stride).reshape(side * side * channels, filters)
    return columns @ matrix if products == "float32" else matmul(columns, matrix.T, products)


def transposed_by_products(images, kernel, stride: int, padding: Pads, products="float32"):
    """`transposed_convolution` as one product to all taps, then overlapping adds in float32."""
    batch, rows, columns, filters = images.shape
    side, _, channels, _ = kernel.shape
    height, width = ((n - 1) * stride + side - sum(padding) for n in (rows, columns))
    matrix = in_cells(kernel, stride).reshape(side * side * channels, filters)
    taps = images @ matrix.T if products == "float32" else matmul(images, matrix, products)
    scatter = jax.linear_transpose(
        functools.partial(patches, side=side, stride=stride, padding=padding),
        jax.ShapeDtypeStruct((batch, height, width, channels), images.dtype),
    )
    return scatter(taps)[0]


def patches(images, side: int, stride: int, padding: Pads):
    """The patch under each position of a side x side window, flat, in the order of `in_cells`.

    Pixels are first grouped into cells of stride x stride (space to depth), so that a patch is
    (side / stride)^2 shifted views of whole cells and nothing is read with a stride. Where
    padding and stride leave pixels over on the far side, these are dropped.
    """
    batch, height, width, channels = images.shape
    reach = side // stride  # cells that a window spans in each direction
    rows, columns = ((n + sum(padding) - side) // stride + 1 for n in (height, width))
    cells_high, cells_wide = rows + reach - 1, columns + reach - 1
    cut = [
        (padding[0], cells * stride - padding[0] - n, 0)
        for cells, n in ((cells_high, height), (cells_wide, width))
    ]
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *cut, (0, 0, 0)])
    cells = padded.reshape(batch, cells_high, stride, cells_wide, stride, channels)
    cells = cells.swapaxes(2, 3).reshape(batch, cells_high, cells_wide, -1)
    views = [cells[:, i : i + rows, j : j + columns] for i in range(reach) for j in range(reach)]
    return jnp.concatenate(views, axis=-1)


def in_cells(kernel, stride: int):
    """Kernel rows in the order of `patches`: cell, place in the cell, channel."""
    side, _, channels, filters = kernel.shape
    reach = side // stride
    split = kernel.reshape(reach, stride, reach, stride, channels, filters)
    return split.swapaxes(1, 2)
