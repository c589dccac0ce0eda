"""The DCGAN's two networks (Radford et al., 2016), for images of 28 or 64 pixels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from gan_jax.convolution import Pads, convolution, transposed_convolution

MOMENTUM = 0.9  # of the running statistics; PyTorch calls it 0.1


class Direction(nnx.BatchStat):
    """Where a kernel stretches most; moves along in training as BatchNorm's statistics do."""


class Convolution(nnx.Module):
    """A convolution, or a transposed one, without bias; `drawn` fills its kernel.

    With `spectral` the kernel is divided by its largest singular value as a matrix with one
    column a filter (Miyato et al., 2018), estimated by power iteration.
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int, stride: int, padding: Pads,
        transposed: bool = False, spectral: bool = False, products: str = "float32",
    ):  # fmt: skip
        ends = (outputs, inputs) if transposed else (inputs, outputs)
        self.kernel = nnx.Param(jnp.zeros((kernel, kernel, *ends)))
        self.transposed, self.stride, self.padding = transposed, stride, padding
        self.spectral, self.products = spectral, products
        if spectral:  # kernels are drawn without a preferred direction: any start will do
            self.direction = Direction(jnp.full(ends[1], ends[1] ** -0.5))

    def __call__(self, images: Array) -> Array:
        apply = transposed_convolution if self.transposed else convolution
        place = {"stride": self.stride, "padding": self.padding}
        return apply(images, self.scaled_kernel(), **place, products=self.products)

    def scaled_kernel(self) -> Float[Array, "kernel kernel inputs outputs"]:
        """The kernel that is applied."""
        kernel = self.kernel[...]
        if not self.spectral:
            return kernel
        return kernel / jnp.linalg.norm(kernel @ self.direction[...])

    def power_iteration(self) -> None:
        """One step of the direction towards the kernel's first singular vector."""
        matrix = self.kernel[...].reshape(-1, self.kernel.shape[-1])
        direction = matrix.T @ (matrix @ self.direction[...])
        self.direction[...] = direction / jnp.linalg.norm(direction)


class Shift(nnx.Module):
    """What is left of BatchNorm beside spectral norm, whose scale BatchNorm would undo."""

    def __init__(self, features: int):
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, hidden: Array, *, use_running_average: bool) -> Array:
        return hidden + self.bias[...].reshape(1, 1, 1, -1)


def normalization(features: int) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=MOMENTUM, epsilon=1e-5, rngs=nnx.Rngs(0))


class Generator(nnx.Module):
    """Latents to images in [-1, 1]: transposed convolutions, BatchNorm and ReLU, then tanh.

    Four blocks of the given widths make 4, 8, 16 and 32 pixels; the last layer alone is fitted
    to the image: 32 to 28 by a kernel of 5, stride 1 and padding 4; 32 to 64 by a kernel of 4,
    stride 2 and padding 1.
    """

    def __init__(
        self,
        *,
        latents: int,
        widths: tuple[int, ...],
        side: int,
        channels: int,
        products: str = "float32",
    ):
        first = {"kernel": 4, "stride": 1, "padding": (0, 0), "products": products}
        double = {"kernel": 4, "stride": 2, "padding": (1, 1), "products": products}
        last = {28: double | {"kernel": 5, "stride": 1, "padding": (4, 4)}, 64: double}[side]
        self.blocks = nnx.List([])
        for index, (inputs, outputs) in enumerate(zip((latents, *widths), widths, strict=False)):
            place = double if index else first
            self.blocks.append(Convolution(inputs, outputs, **place, transposed=True))
        self.norms = nnx.List([normalization(width) for width in widths])
        self.image = Convolution(widths[-1], channels, **last, transposed=True)

    def __call__(
        self, latents: Float[Array, "batch latent"], *, train: bool
    ) -> Float[Array, "batch height width channels"]:
        hidden = latents[:, None, None, :]
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = jax.nn.relu(norm(block(hidden), use_running_average=not train))
        return jnp.tanh(self.image(hidden))


class Discriminator(nnx.Module):
    """Images to one logit each, positive for real: four blocks of convolution, BatchNorm and
    LeakyReLU that halve the side (28-14-7-4-2 or 64-32-16-8-4), then a logit layer.

    With `spectral` every kernel has spectral norm 1, and the blocks have a bias for BatchNorm.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        side: int,
        channels: int,
        spectral: bool = False,
        products: str = "float32",
    ):
        same = {"spectral": spectral, "products": products}
        self.blocks = nnx.List([])
        for inputs, outputs in zip((channels, *widths), widths, strict=False):
            place = {"kernel": 4, "stride": 2, "padding": (1, 1 + side % 2)}  # 7 pixels become 4
            self.blocks.append(Convolution(inputs, outputs, **place, **same))
            side = -(-side // 2)
        norm = Shift if spectral else normalization
        self.norms = nnx.List([norm(width) for width in widths])
        place = {"kernel": side, "stride": 1, "padding": (0, 0)}
        self.logit = Convolution(widths[-1], 1, **place, **same)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, " batch"]:
        hidden = images
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = jax.nn.leaky_relu(norm(block(hidden), use_running_average=not train), 0.2)
        return self.logit(hidden)[:, 0, 0, 0]

    def power_iteration(self) -> None:
        """One step for every kernel with spectral norm."""
        for layer in [*self.blocks, self.logit]:
            if layer.spectral:
                layer.power_iteration()


def drawn(params: Any, key: Key[Array, ""]) -> Any:
    """Parameters as the paper draws them: kernels from N(0, 0.02), BatchNorm's scales from
    N(1, 0.02), shifts 0. All from one draw, since each shape of random numbers would be
    compiled."""
    paths, tree = jax.tree.flatten_with_path(params)
    noise = 0.02 * jax.random.normal(key, (sum(leaf.size for _, leaf in paths),))
    leaves, start = [], 0
    for path, leaf in paths:
        here = noise[start : start + leaf.size].reshape(leaf.shape)
        leaves.append(leaf if "bias" in jax.tree_util.keystr(path) else leaf + here)
        start += leaf.size
    return jax.tree.unflatten(tree, leaves)
