"""Distances between image sets and detectors of mode collapse, as functions of arrays.

Features are points in a feature space (gan_jax/features.py); images are in [-1, 1].
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import rel_entr
from jaxtyping import Array, Float, Int, UInt8

from gan_jax.training import to_unit

Numbers = Array | np.ndarray
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest scale first
CHUNK = 4096  # images at a time in a search for the nearest
WINDOW = 7  # pixels; side of the window in which SSIM compares two images
PAIRS = 256  # pairs at a time in which SSIM compares images
ORDERS = 400  # random orders over which the birthday test takes a median


def frechet_distance(
    sample: Float[Numbers, "sample features"], reference: Float[Numbers, "reference features"]
) -> float:
    """Fréchet distance of two Gaussians fitted to the features (Heusel et al., 2017; @eq-fid).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. It is biased upwards, more so for
    fewer images: compare only values from the same number of images.
    """
    first, second = np.asarray(sample, np.float64), np.asarray(reference, np.float64)
    cov1, cov2 = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (first, second))
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # tr (C1 C2)^(1/2) from the symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    shift = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return float(shift + np.trace(cov1) + np.trace(cov2) - 2 * overlap)


def kernel_distance(
    sample: Float[Numbers, "sample features"], reference: Float[Numbers, "reference features"]
) -> Float[Numbers, ""]:
    """Squared MMD under the cubic kernel (x.y / d + 1)^3 (Binkowski et al., 2018; @eq-kid).

    The estimate is unbiased: 0 on average for two samples of one distribution, so often below.
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        gram, count = kernel(a, a), a.shape[0]
        return (gram.sum() - jnp.trace(gram)) / (count * (count - 1))

    return within(sample) + within(reference) - 2 * kernel(sample, reference).mean()


def manifold_scores(
    sample: Float[Numbers, "sample features"],
    reference: Float[Numbers, "reference features"],
    *,
    neighbours: int,
) -> dict[str, Float[Numbers, ""]]:
    """Precision and recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020).

    A point's ball reaches to its k-th nearest neighbour in its own set.

    Returns:
      precision: share of the sample inside any reference ball.
      recall: share of the reference inside any sample ball.
      density: reference balls around a point of the sample on average, over k; 1 is par.
      coverage: share of the reference balls that hold a point of the sample.
    """
    distances = squared_distances(reference, sample)
    reference_radius = kth_distance(reference, neighbours)
    sample_radius = kth_distance(sample, neighbours)
    in_reference = distances <= reference_radius[:, None]
    return {
        "precision": in_reference.any(axis=0).mean(),
        "recall": (distances <= sample_radius[None, :]).any(axis=1).mean(),
        "density": in_reference.sum(axis=0).mean() / neighbours,
        "coverage": in_reference.any(axis=1).mean(),
    }


def kth_distance(points: Float[Numbers, "point features"], k: int) -> Float[Numbers, " point"]:
    """Squared distance of each point to its k-th nearest other point."""
    return jnp.sort(squared_distances(points, points), axis=1)[:, k]  # column 0 is the point itself


def squared_distances(
    first: Float[Numbers, "first features"], second: Float[Numbers, "second features"]
) -> Float[Numbers, "first second"]:
    """Squared Euclidean distances of all pairs, by one matrix product."""
    centre = first.mean(axis=0, keepdims=True)  # smaller numbers cancel less
    first, second = first - centre, second - centre
    squares = jnp.square(first).sum(axis=1)[:, None] + jnp.square(second).sum(axis=1)[None, :]
    return jnp.maximum(squares - 2 * first @ second.T, 0)


def neighbour_accuracy(
    sample: Float[Numbers, "points features"], reference: Float[Numbers, "points features"]
) -> Float[Numbers, ""]:
    """Leave-one-out accuracy of the 1-nearest-neighbour two-sample test (Lopez-Paz & Oquab, 2017).

    0.5 when both sets come from one distribution, towards 1 when they can be told apart, towards
    0 when one copies the other.
    """
    points = jnp.concatenate([sample, reference])
    real = jnp.arange(len(points)) >= len(sample)
    distances = squared_distances(points, points) + jnp.diag(jnp.full(len(points), jnp.inf))
    return (real[jnp.argmin(distances, axis=1)] == real).mean()


def class_divergence(
    sample: Float[Numbers, "sample classes"], reference: Float[Numbers, "reference classes"]
) -> Float[Numbers, ""]:
    """KL divergence (nats) of the sample's class histogram from the reference's.

    The direction is reference to sample, which punishes a class that the sample lacks. A
    histogram is the mean of the classifier's probabilities.
    """
    return rel_entr(reference.mean(axis=0), sample.mean(axis=0)).sum()


@functools.partial(jax.jit, static_argnames="scales")
def similarity(
    first: Float[Numbers, "pair height width channels"],
    second: Float[Numbers, "pair height width channels"],
    *,
    scales: int | None = None,
) -> Float[Numbers, " pair"]:
    """Multi-scale structural similarity of each pair (Wang et al., 2003), 1 for equal images.

    Uniform windows of 7 x 7, and as many of the five scales as the image has room for (3 at 28
    pixels, 4 at 64), their weights rescaled to sum to 1. With one scale it is plain SSIM.
    """
    room = sum(first.shape[1] >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS)))
    scales = scales or room
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    result = 1.0
    for scale, weight in enumerate(weights):
        luminance, contrast = similarity_terms(first, second)
        term = luminance * contrast if scale == scales - 1 else contrast
        result *= jnp.maximum(term.mean(axis=(1, 2, 3)), 0) ** weight
        first, second = halved(first), halved(second)
    return result


def pair_similarities(
    images: Float[np.ndarray, "image height width channels"], pairs: Int[np.ndarray, "pair 2"]
) -> Float[np.ndarray, " pair"]:
    """MS-SSIM of the images that each pair of indices names, in chunks of one size."""
    padded = np.pad(pairs, ((0, -len(pairs) % PAIRS), (0, 0))).reshape(-1, PAIRS, 2)
    found = [similarity(images[chunk[:, 0]], images[chunk[:, 1]]) for chunk in padded]
    return np.concatenate(found)[: len(pairs)]


def within_class_similarity(
    images: Float[Numbers, "image height width channels"], classes: Int[Numbers, " image"]
) -> Float[Numbers, ""]:
    """Mean MS-SSIM of pairs of images of one class; each image is in one pair at most.

    High where a class is drawn in few ways, which the mean over all pairs hides when there are
    many classes (Odena et al., 2017).
    """
    order = jnp.argsort(classes)
    first, second = order[0 : len(order) // 2 * 2 : 2], order[1::2]
    same = classes[first] == classes[second]
    return (similarity(images[first], images[second]) * same).sum() / jnp.maximum(same.sum(), 1)


def similarity_terms(first, second):
    """SSIM's luminance and contrast-structure terms under each window."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # 2 is the range of the pixels
    mean1, mean2 = window_mean(first), window_mean(second)
    variance1 = window_mean(first * first) - mean1**2
    variance2 = window_mean(second * second) - mean2**2
    covariance = window_mean(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    return luminance, (2 * covariance + c2) / (variance1 + variance2 + c2)


def window_mean(images):
    shape = (1, WINDOW, WINDOW, 1)
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, shape, (1, 1, 1, 1), "VALID") / WINDOW**2


def halved(images):
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    return jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def twin_distances(images: Float[Numbers, "image pixels"]) -> Float[Numbers, " image"]:
    """Root mean square difference of each image to the most similar other one."""
    return jnp.sqrt(kth_distance(images, 1) / images.shape[1])


def birthday_size(
    images: Float[Numbers, "image pixels"], distance: float, random: np.random.Generator
) -> int:
    """Fewest images among which two are twins in half of all cases (Arora & Zhang, 2017).

    The median over random orders of how many images it takes until the first two twins (nearer
    than `distance`, a root mean square) are among them. All images where no two are twins: a
    lower bound then.
    """
    near = np.triu(np.asarray(within(images, distance)), 1)
    first, second = np.nonzero(near)
    if not len(first):
        return len(images)
    places = (random.permutation(len(images)) for _ in range(ORDERS))
    counts = [np.maximum(place[first], place[second]).min() + 1 for place in places]
    return int(np.quantile(counts, 0.5, method="inverted_cdf"))


@jax.jit
def within(images, distance):
    return squared_distances(images, images) < images.shape[1] * distance**2


def support_size(images: float) -> float:
    """How many equally likely images there would be, if among so many two are twins in half of
    all cases; 365 for 23. More than that exist where some are likelier than others."""
    return images * (images - 1) / (2 * math.log(2))


def nearest(
    queries: Float[Numbers, "query height width channels"],
    images: UInt8[np.ndarray, "image height width channels"],
) -> tuple[Float[np.ndarray, " query"], Int[np.ndarray, " query"]]:
    """Distance of each query to the nearest image (sum of squares over pixels), and its index."""
    starts = range(0, len(images), CHUNK)
    found = [nearest_in_chunk(queries, images[start : start + CHUNK]) for start in starts]
    distances, indices = (np.stack(parts) for parts in zip(*found, strict=True))
    best = distances.argmin(axis=0)
    columns = np.arange(len(queries))
    return distances[best, columns], best * CHUNK + indices[best, columns]


@jax.jit
def nearest_in_chunk(queries, images):
    pixels = to_unit(images).reshape(len(images), -1)
    distances = squared_distances(queries.reshape(len(queries), -1), pixels)
    return distances.min(axis=1), distances.argmin(axis=1)


def train_nearest_share(
    queries: Float[Numbers, "query height width channels"],
    train: UInt8[np.ndarray, "train height width channels"],
    held_out: UInt8[np.ndarray, "held height width channels"],
) -> float:
    """Share of images whose nearest real image is a training image.

    Around train / (train + held) when the generator has learnt the distribution, 1 when it
    recites the training images (memorisation), which FID would reward.
    """
    return float((nearest(queries, train)[0] < nearest(queries, held_out)[0]).mean())
