"""Which detector catches what: every detector on image sets whose defect is known.

The scenarios are real images against real images, other real images, real images with noise or
blurred, as much as it takes for the trained generator's FID, real images with a planted defect, a
generator collapsed on purpose, and at last the trained generator. Each
detector is computed on several draws of each. For every draw the held-out images are divided anew
at random: "real" takes one half, every other scenario the other, so that "real" and "real, other
images" differ by chance alone. A detector catches a scenario when the differences to "real", draw
by draw, have a mean other than 0 by a t-test, after Holm's correction over all of them: that
anything at all is caught among the other real images happens in at most 5 % of evaluations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage, stats

from experiment_runs.process import progress
from gan_jax import detectors
from gan_jax.config import EvidenceConfig
from gan_jax.data import ImageSet
from gan_jax.features import FeatureSpace, flat
from gan_jax.training import to_unit

MOST_NOISE = 1.0  # standard deviation, pixels are in [-1, 1]
MOST_BLUR = 0.2  # standard deviation, of an image's side
MODES = 10  # images or latents that a collapsed set consists of
AGAIN = "real, other images"
BLURRED = "real, blurred"
LEVEL = 0.05  # of all tests together
TWIN_QUANTILE = 0.05  # share of real images that count as having a twin

Images = Float[np.ndarray, "item height width channels"]  # in [-1, 1]
Bytes = UInt8[np.ndarray, "real height width channels"]
Generate = Callable[[Float[np.ndarray, "image latent"]], Images]
Scenario = Callable[[np.random.Generator, np.ndarray, int], Images]
"""Draws so many images, real ones from the held-out ones with these indices."""


class RealImages(NamedTuple):
    """The real images that every draw is compared with."""

    train: np.ndarray
    others: np.ndarray  # held-out images from which no scenario draws
    twin_distance: float  # root mean square; two images nearer than this are twins
    count: int  # images in a draw
    pool: int  # of the held-out images the first so many are drawn from


def real_images(images: ImageSet, random: np.random.Generator, cfg: EvidenceConfig) -> RealImages:
    """Sets the twins' distance so that `TWIN_QUANTILE` of the real images in a draw have one.

    A draw has no image twice: where half of the pool, or what is left of it without a class, is
    smaller than a draw, draws are.
    """
    pool = len(images.held_out) * 2 // 3
    half = pool // 2
    if (left_out := second_class(images)) is not None:
        share = (images.held_out_labels[:pool].argmax(axis=1) == left_out).mean()
        half = int(half * (1 - share) - 2 * np.sqrt(half))  # four deviations fewer, at least
    count = max(min(cfg.images, half), cfg.neighbours + 1)
    distances = [
        detectors.twin_distances(flat(pick(images.train, random, count))) for _ in range(cfg.draws)
    ]
    distance = float(np.quantile(distances, TWIN_QUANTILE))
    return RealImages(images.train, images.held_out[pool:], distance, count, pool)


def second_class(images: ImageSet) -> int | None:
    """The second most frequent class of the held-out images, None where they have one alone."""
    if not images.classes:
        return None
    counts = np.bincount(images.held_out_labels.argmax(axis=1), minlength=2)
    second = int(np.argsort(counts)[-2])
    return second if counts[second] else None


def pick(images: Bytes, random: np.random.Generator, count: int) -> Images:
    """So many different images, or with repetition where there are too few."""
    return to_unit(images[random.choice(len(images), count, replace=len(images) < count)])


def noisy(pixels: Images, noise: np.ndarray) -> Images:
    """Clipped to what pixels can be."""
    return (pixels + noise).clip(-1, 1).astype(np.float32)


def blurred(pixels: Images, deviation: float) -> Images:
    """Through a Gaussian filter, its deviation as a share of the side: details go, no mode does."""
    blur = deviation * pixels.shape[1]
    return ndimage.gaussian_filter(pixels, (0, blur, blur, 0))


class Matched(NamedTuple):
    """How much noise and blur it takes for real images to have a generator's FID."""

    fid: float
    noise: float  # standard deviation
    blur: float  # standard deviation, as a share of the side


def matched(
    fid: float,
    images: ImageSet,
    real: RealImages,
    space: FeatureSpace,
    random: np.random.Generator,
    *,
    steps: int,
) -> Matched:
    """Searches noise and blur by halving the range that they lie in, so many times.

    Args:
      fid: of the generator; beyond what the most noise or blur makes, that most is taken.
      images: real ones, of which held-out ones are distorted.
      real: how many make a draw.
      space: where the FID is measured.
      random: draws images and noise.
      steps: how many halvings.
    """
    reference = space.embed(pick(images.train, random, real.count))[0]
    pixels = pick(images.held_out[: real.pool], random, real.count)
    noise = random.normal(size=pixels.shape)

    def searched(distorted, high):
        low = 0.0
        for _ in range(steps):
            middle = (low + high) / 2
            found = detectors.frechet_distance(space.embed(distorted(middle))[0], reference)
            low, high = (middle, high) if found < fid else (low, middle)
        return high

    return Matched(
        fid,
        searched(lambda deviation: noisy(pixels, deviation * noise), MOST_NOISE),
        searched(lambda deviation: blurred(pixels, deviation), MOST_BLUR),
    )


def scenarios(
    images: ImageSet, generate: Generate, latents: int, strengths: Matched
) -> dict[str, Scenario]:
    """The image sets by name, "real" first and "generated" last.

    Args:
      images: real ones, of which the held-out ones with the given indices are drawn.
      generate: maps latents to images.
      latents: length of a latent.
      strengths: of the noise and of the blur in the sets that have them.
    """
    held_out = images.held_out

    def real(random, own, count):
        return pick(held_out[own], random, count)

    def with_noise(random, own, count):
        drawn = real(random, own, count)
        return noisy(drawn, strengths.noise * random.normal(size=drawn.shape))

    def with_blur(random, own, count):
        return blurred(real(random, own, count), strengths.blur)

    def repeated(random, own, count):
        return real(random, own, MODES)[random.integers(MODES, size=count)]

    def collapsed(random, _, count):
        modes = random.normal(size=(MODES, latents))[random.integers(MODES, size=count)]
        return generate(modes + 0.05 * random.normal(size=modes.shape))

    sets: dict[str, Scenario] = {
        "real": real, AGAIN: real, "real + noise": with_noise, BLURRED: with_blur,
    }  # fmt: skip
    if (second := second_class(images)) is not None:  # of one class alone none can be left out
        labels = images.held_out_labels.argmax(axis=1)
        sets[f"without {images.classes[second]}"] = lambda random, own, count: real(
            random, own[labels[own] != second], count
        )
    return sets | {
        "copies of training images": lambda random, _, count: pick(images.train, random, count),
        f"{MODES} real images repeated": repeated,
        f"generator collapsed to {MODES} latents": collapsed,
        "generated": lambda random, _, count: generate(random.normal(size=(count, latents))),
    }


def measured(
    sets: Mapping[str, Scenario],
    real: RealImages,
    space: FeatureSpace,
    cfg: EvidenceConfig,
    seed: list[int],
) -> dict[str, dict[str, list[float]]]:
    """Values of every detector, by scenario, one for each draw."""
    values: dict[str, dict[str, list[float]]] = {}
    with progress(label="detectors", total=len(sets) * cfg.draws) as bar:
        for draw in range(cfg.draws):
            # one reference for all scenarios of a draw
            random = np.random.default_rng([*seed, draw])
            reference = pick(real.train, random, real.count)
            embedded = space.embed(reference)
            own, others = np.array_split(random.permutation(real.pool), 2)
            for number, (name, scenario) in enumerate(sets.items()):
                random = np.random.default_rng([*seed, draw, number])
                sample = scenario(random, own if number == 0 else others, real.count)
                found = measure(sample, space.embed(sample), embedded, real, cfg.neighbours, random)
                for detector, value in found.items():
                    values.setdefault(name, {}).setdefault(detector, []).append(value)
                bar.update()
    return values


def measure(
    sample: Images,
    embedded: tuple,
    reference: tuple,
    real: RealImages,
    neighbours: int,
    random: np.random.Generator,
) -> dict[str, float]:
    """Every detector on one draw.

    Args:
      sample: the drawn images.
      embedded: their features and class probabilities (None where there are no classes).
      reference: features and probabilities of as many training images.
      real: the real images.
      neighbours: k of the manifold scores.
      random: orders the images for the birthday test.
    """
    values = {
        **compiled_detectors(sample, embedded, reference, real.twin_distance, neighbours),
        "birthday": detectors.birthday_size(flat(sample), real.twin_distance, random),
        "train_nearest": detectors.train_nearest_share(sample, real.train, real.others),
        "fid": detectors.frechet_distance(embedded[0], reference[0]),
    }
    return {name: float(values[name]) for name in sorted(values)}


@functools.partial(jax.jit, static_argnames="neighbours")
def compiled_detectors(sample, embedded, reference, twin_distance, neighbours: int):
    """The detectors on float32 arrays of fixed shapes."""
    features, probabilities = embedded
    real_features, real_probabilities = reference
    half = len(sample) // 2
    values = {
        "kid": detectors.kernel_distance(features, real_features),
        **detectors.manifold_scores(features, real_features, neighbours=neighbours),
        "nn_accuracy": detectors.neighbour_accuracy(features, real_features),
        "ms_ssim": detectors.similarity(sample[:half], sample[half : 2 * half]).mean(),
        "twins": (detectors.twin_distances(flat(sample)) < twin_distance).mean(),
    }
    if probabilities is not None:
        values["class_divergence"] = detectors.class_divergence(probabilities, real_probabilities)
        classes = probabilities.argmax(axis=1)
        values["class_ms_ssim"] = detectors.within_class_similarity(sample, classes)
    return values


def calibration_table(values: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """One row for each scenario and detector (@tbl-gan-detectors).

    Returns:
      Rows with `mean` over the draws, its 95 % interval `low` to `high`, `real_low` to `real_high`,
      where 95 % of the draws of real against real fall (both by Student's t), `p` of the difference
      to "real" after Holm's correction over all rows, and `caught`: whether `p` is below `LEVEL`.
    """
    rows = [
        {
            "scenario": scenario,
            "detector": detector,
            "p": difference_p(draws, values["real"][detector]),
        }
        for scenario, by_detector in values.items()
        for detector, draws in by_detector.items()
    ]
    tested = [row for row in rows if row["scenario"] != "real"]
    corrected = holm([row["p"] for row in tested])
    for row, p in zip(tested, corrected, strict=True):
        row["p"] = p
    for row in rows:
        draws, real = (values[name][row["detector"]] for name in (row["scenario"], "real"))
        low, high = interval(real, of_mean=False)
        row |= {**estimate(draws), "real_low": low, "real_high": high, "caught": row["p"] < LEVEL}
    return rows


def difference_p(draws: Sequence[float], others: Sequence[float]) -> float:
    """Of a t-test that the differences, draw by draw, have mean 0; draws that do not differ at all
    have 1, and those that all differ by the same have 0."""
    differences = np.subtract(draws, others)
    deviation = np.std(differences, ddof=1)
    if deviation == 0:
        return float(not differences.any())
    t = differences.mean() / (deviation / np.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): below a level, they are so for all tests together."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(np.asarray(p_values)[order] * factors, 1))
    return adjusted.tolist()


def birthday_table(
    values: Mapping[str, Mapping[str, list[float]]], images: int
) -> list[dict[str, Any]]:
    """Size of the support of each scenario by the birthday test (@tbl-gan-birthday).

    Returns:
      Rows with `size`, how many images it takes until two are twins in half of all cases, and
      `support`, how many equally likely images that stands for: both with 95 % intervals over
      the draws. `bounded` says that a draw of so many `images` held no twins, so that both are
      too low.
    """
    rows = []
    for scenario, by_detector in values.items():
        draws = by_detector["birthday"]
        size = estimate(draws)
        size["low"] = max(size["low"], 2.0)  # two are the fewest
        support = {name: detectors.support_size(value) for name, value in size.items()}
        bounded = images in draws
        rows.append({"scenario": scenario, "size": size, "support": support, "bounded": bounded})
    return rows


def estimate(draws: Sequence[float]) -> dict[str, float]:
    """Mean of the draws with its 95 % interval."""
    low, high = interval(draws, of_mean=True)
    return {"mean": float(np.mean(draws)), "low": low, "high": high}


def interval(draws: Sequence[float], *, of_mean: bool) -> tuple[float, float]:
    """95 % interval of the mean of normal draws, or of one more draw."""
    count, mean, deviation = len(draws), np.mean(draws), np.std(draws, ddof=1)
    spread = np.sqrt(1 / count if of_mean else 1 + 1 / count)
    reach = stats.t.ppf(0.975, count - 1) * deviation * spread
    return float(mean - reach), float(mean + reach)
