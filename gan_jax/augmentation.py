"""Differentiable augmentation (Zhao et al., 2020): what the discriminator sees of an image.

Real and generated images alike are changed at random before the discriminator judges them, and
the generator's gradient passes through the change. So the discriminator cannot learn few images
by heart, and the changes do not leak into what is generated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

SHIFT = 1 / 8  # farthest translation, of the side
HOLE = 1 / 2  # side of the square that is cut out, of the image's

Batch = Float[Array, "batch height width channels"]


def augmented(images: Batch, key: Key[Array, ""], policies: tuple[str, ...]) -> Batch:
    """The images after each policy in turn, every image with its own random numbers."""
    for policy, own in zip(policies, jax.random.split(key, max(1, len(policies))), strict=False):
        images = POLICIES[policy](images, own)
    return images


def colour(images: Batch, key: Key[Array, ""]) -> Batch:
    """Brightness up or down by at most 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    uniform = jax.random.uniform(key, (3, len(images), 1, 1, 1))
    images = images + uniform[0] - 0.5
    grey = images.mean(axis=3, keepdims=True)
    images = grey + (images - grey) * 2 * uniform[1]
    level = images.mean(axis=(1, 2, 3), keepdims=True)
    return level + (images - level) * (uniform[2] + 0.5)


def translation(images: Batch, key: Key[Array, ""]) -> Batch:
    """Each image moved by whole pixels in both directions; what comes in is 0, mid-grey."""
    _, height, width, channels = images.shape
    reach = round(height * SHIFT)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)

    def moved(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(moved)(padded, corners)


def cutout(images: Batch, key: Key[Array, ""]) -> Batch:
    """A square of each image set to 0; its centre lies anywhere, so it may reach over the edge."""
    _, height, width, _ = images.shape
    hole = round(height * HOLE)
    first = jax.random.randint(key, (2, len(images), 1), 0, height + 1) - hole // 2

    def inside(start, side):
        pixels = jnp.arange(side)[None, :]
        return (start <= pixels) & (pixels < start + hole)

    rows, columns = inside(first[0], height), inside(first[1], width)
    cut = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(cut, 0.0, images)


POLICIES = {"colour": colour, "translation": translation, "cutout": cutout}
