"""Intervals: every figure of the report that is a mean over a sample carries one."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(
    values: Float[np.ndarray, "items"],
    *,
    clusters: Shaped[np.ndarray, "items"] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean with a 95 % percentile interval (Efron, 1979).

    Args:
      values: one number an item; for a paired comparison, the differences.
      clusters: items of equal label are drawn together, as pairs of one post must be.
      resamples: number of samples drawn with replacement.
      seed: for the draws.
    """
    values = np.asarray(values, np.float64)
    if clusters is None:
        clusters = np.arange(len(values))
    labels = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(labels, values)
    counts = np.bincount(labels)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 256):  # bounds the memory of the drawn indices
        drawn = rng.integers(0, len(sums), (min(256, resamples - start), len(sums)))
        means[start : start + 256] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def bootstrap_crossed(
    values: Float[np.ndarray, "seeds items"],
    *,
    clusters: Shaped[np.ndarray, "items"] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean over seeds and items with a 95 % interval that both could have come out otherwise.

    Seeds and clusters are drawn with replacement independently of each other (Owen, 2007: the
    pigeonhole bootstrap). Few seeds show less spread than there is: of n, about (n - 1) / n of its
    variance.

    Args:
      values: one number a seed and item; for a paired comparison, the differences.
      clusters: items of equal label are drawn together.
      resamples: number of samples drawn with replacement.
      seed: for the draws.
    """
    values = np.asarray(values, np.float64)
    seeds, items = values.shape
    labels = np.unique(np.arange(items) if clusters is None else clusters, return_inverse=True)[1]
    sums = np.stack([np.bincount(labels, row) for row in values])
    counts = np.bincount(labels)
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    means = np.einsum("rs,sc,rc->r", drawn_seeds, sums, drawn, optimize=True) / (
        seeds * (drawn @ counts)
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), items)


def bootstrap_weighted(
    statistic: Callable[[Float[np.ndarray, "items"]], float],
    *,
    clusters: Shaped[np.ndarray, "items"],
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A statistic of weighted items with its 95 % percentile interval.

    Args:
      statistic: of the weights; in a sample, how often the cluster of each item was drawn.
      clusters: items of equal label are drawn together.
      resamples: number of samples drawn with replacement.
      seed: for the draws.
    """
    labels = np.unique(clusters, return_inverse=True)[1]
    count = labels.max() + 1
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(np.bincount(rng.integers(0, count, count), minlength=count)[labels] * 1.0)
        for _ in range(resamples)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(statistic(np.ones(len(labels))), float(low), float(high), len(labels))


def by_group(
    values: Float[np.ndarray, "items"],
    groups: Shaped[np.ndarray, "items"],
    *,
    clusters: Shaped[np.ndarray, "items"],
) -> dict[str, dict[str, float]]:
    """An interval for each group of items; those of a cluster are drawn together."""
    members = {str(group): groups == group for group in sorted(set(groups))}
    return {
        group: bootstrap(values[own], clusters=clusters[own])._asdict()
        for group, own in members.items()
    }
