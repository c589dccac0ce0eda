"""Evidence about trained networks: everything that the report shows of them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from scipy import stats

from gan_jax import calibration, detectors
from gan_jax.calibration import Images, RealImages
from gan_jax.config import GANConfig
from gan_jax.data import ImageSet
from gan_jax.features import FeatureSpace, feature_space, flat
from gan_jax.training import GRID_SHAPE, Definitions, State, evaluated, to_bytes, to_unit

CLASSIFIER, EVIDENCE, DRAWS = range(10, 13)  # random streams, apart from those of training
RESAMPLES = 1000  # of the bootstrap


def evaluate(
    cfg: GANConfig, images: ImageSet, networks: Definitions, state: State
) -> tuple[dict[str, Any], dict[str, UInt8[np.ndarray, "rows columns height width channels"]]]:
    """Everything that the report says and shows about trained networks.

    Returns:
      The numbers, as `Run.finish` takes them, and grids of images, rows first.
    """
    key = jax.random.fold_in(jax.random.key(cfg.seed), CLASSIFIER)
    space = feature_space(images, key, steps=cfg.evidence.classifier_steps)
    random = np.random.default_rng([cfg.seed, EVIDENCE])

    def generate(latents):
        return evaluated(networks.generator, state.generator, latents.astype(np.float32))[0]

    def logits(pixels):
        return evaluated(networks.discriminator, state.discriminator, pixels)[0]

    real = calibration.real_images(images, random, cfg.evidence)
    sets = calibration.scenarios(images, generate, cfg.latents)
    values = calibration.measured(sets, real, space, cfg.evidence, [cfg.seed, DRAWS])
    held_out = to_unit(images.held_out)
    train = calibration.pick(images.train, random, len(held_out))
    generated = generate(random.normal(size=(len(held_out), cfg.latents)))
    scores = {"train": train, "held_out": held_out, "generated": generated}
    scores = {name: logits(pixels) for name, pixels in scores.items()}
    rows, columns = GRID_SHAPE
    grids = {
        "generated": generated[: rows * columns].reshape(*GRID_SHAPE, *images.train.shape[1:]),
        "real": train[: rows * columns].reshape(*GRID_SHAPE, *images.train.shape[1:]),
        "interpolation": interpolation(generate, random, cfg.latents),
        "neighbours": neighbours(generated[:columns], real),
        "twins": twins(generated[: cfg.evidence.images], columns),
    }
    summary = {
        "feature_space": space.name,
        "classifier": space.accuracy,
        "detectors": calibration.calibration_table(values),
        "class_histogram": class_histogram(images, space, held_out, generated),
        "train_nearest_by_chance": len(real.train) / (len(real.train) + len(real.others)),
        "discriminator": discriminator_summary(scores["held_out"], scores["generated"]),
        "scores": scores_summary(scores, random),
    }
    return summary, {name: to_bytes(grid) for name, grid in grids.items()}


def class_histogram(
    images: ImageSet, space: FeatureSpace, held_out: Images, generated: Images
) -> list[dict[str, Any]]:
    """Share of each class among held-out and generated images, by the classifier's mean
    probabilities, beside the labels' own; empty where there are no labels."""
    if not images.classes:
        return []
    shares = [space.embed(pixels)[1].mean(axis=0) for pixels in (held_out, generated)]
    rows = zip(images.classes, images.held_out_labels.mean(axis=0), *shares, strict=True)
    return [
        {"class": name, "labels": labels, "held_out": real, "generated": fake}
        for name, labels, real, fake in rows
    ]


def discriminator_summary(
    real: Float[np.ndarray, " held"], generated: Float[np.ndarray, " held"]
) -> dict[str, Any]:
    """The discriminator as a classifier of held-out and generated images.

    Returns:
      confusion: counts, rows are the truth, columns the verdict, generated first, real second.
      report: precision, recall, F1 and support of each class, as scikit-learn reports them.
      accuracy: with its 95 % interval (Wilson), on as many images of either kind.
    """
    verdicts = [generated > 0, real > 0]
    confusion = np.array([[np.sum(~verdict), np.sum(verdict)] for verdict in verdicts])
    report = []
    for number, name in enumerate(("generated", "real")):
        hits, claimed, support = (
            confusion[number, number], confusion[:, number].sum(), confusion[number].sum()
        )  # fmt: skip
        precision, recall = hits / max(claimed, 1), hits / support
        f1 = 2 * hits / (claimed + support)
        report.append(
            {"class": name, "precision": precision, "recall": recall, "f1": f1, "support": support}
        )
    hits, total = int(np.trace(confusion)), int(confusion.sum())
    low, high = stats.binomtest(hits, total).proportion_ci(method="wilson")
    accuracy = {"mean": hits / total, "low": low, "high": high}
    return {"confusion": confusion, "report": report, "accuracy": accuracy}


def scores_summary(
    logits: dict[str, Float[np.ndarray, " image"]], random: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Mean D(x) by kind of image, and how much higher training images score than held-out ones.

    A `gap` above 0 says that the discriminator knows its training images by heart. The 95 %
    intervals are bootstrapped over images.
    """
    scores = {name: 1 / (1 + np.exp(-values.astype(float))) for name, values in logits.items()}
    resampled = {
        name: [random.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
        for name, values in scores.items()
    }
    means = {name: values.mean() for name, values in scores.items()}
    means["gap"] = means["train"] - means["held_out"]
    resampled["gap"] = np.subtract(resampled["train"], resampled["held_out"])
    result = {}
    for name, mean in means.items():
        low, high = np.quantile(resampled[name], [0.025, 0.975])
        result[name] = {"mean": mean, "low": low, "high": high}
    return result


def interpolation(
    generate: Callable, random: np.random.Generator, latents: int
) -> Float[np.ndarray, "rows columns height width channels"]:
    """Each row walks from one latent to another on the sphere: smooth change is a good sign,
    jumps between a few images are a sign of memorisation or collapse."""
    rows, columns = GRID_SHAPE
    ends = random.normal(size=(2, rows, 1, latents))
    angle = np.linspace(0, np.pi / 2, columns)[:, None]  # independent latents are orthogonal
    path = np.cos(angle) * ends[0] + np.sin(angle) * ends[1]
    images = generate(path.reshape(-1, latents))
    return images.reshape(rows, columns, *images.shape[1:])


def neighbours(
    generated: Float[np.ndarray, "columns height width channels"], real: RealImages
) -> Float[np.ndarray, "3 columns height width channels"]:
    """Generated images, below each its nearest training image, and its nearest held-out one."""
    found = [
        to_unit(images[detectors.nearest(generated, images)[1]])
        for images in (real.train, real.others)
    ]
    return np.stack([generated, *found])


def twins(
    images: Float[np.ndarray, "image height width channels"], count: int
) -> Float[np.ndarray, "2 columns height width channels"]:
    """The most similar pairs of different images, one above the other (Arora & Zhang, 2018)."""
    pixels = flat(images)
    distances = np.array(detectors.squared_distances(pixels, pixels))
    distances[np.tril_indices(len(images))] = np.inf
    nearest_first = np.argsort(distances, axis=None)[:count]
    return np.stack([images[side] for side in np.unravel_index(nearest_first, distances.shape)])
