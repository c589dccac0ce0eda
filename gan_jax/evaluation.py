"""Evidence about trained networks: everything that the report shows of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import stats

from gan_jax import calibration, detectors
from gan_jax.calibration import Images, RealImages
from gan_jax.config import GANConfig
from gan_jax.data import ImageSet
from gan_jax.features import FeatureSpace, feature_space, flat
from gan_jax.training import GRID_SHAPE, Definitions, State, evaluated, to_bytes, to_unit

CLASSIFIER, EVIDENCE, DRAWS, MATCHING = 10, 11, 12, 13  # random streams, apart from training's
RESAMPLES = 1000  # of the bootstrap
FEWEST_PAIRS = 10  # of images of a class, from which on an interval of their mean is worth its name


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
    strengths = matched_strengths(cfg, images, generate, real, space)
    sets = calibration.scenarios(images, generate, cfg.latents, strengths)
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
        "matched": strengths._asdict(),
        "detectors": calibration.calibration_table(values),
        "birthday": calibration.birthday_table(values, real.count),
        **class_summaries(images, space, held_out, generated, cfg.evidence.images, random),
        "discriminator": discriminator_summary(scores["held_out"], scores["generated"]),
        "scores": scores_summary(scores, random),
    }
    return summary, {name: to_bytes(grid) for name, grid in grids.items()}


def matched_strengths(
    cfg: GANConfig,
    images: ImageSet,
    generate: calibration.Generate,
    real: RealImages,
    space: FeatureSpace,
) -> calibration.Matched:
    """How much noise and blur it takes for real images to have the generator's FID."""
    random = np.random.default_rng([cfg.seed, MATCHING])
    generated = generate(random.normal(size=(real.count, cfg.latents)))
    reference = calibration.pick(images.train, random, real.count)
    fid = detectors.frechet_distance(space.embed(generated)[0], space.embed(reference)[0])
    steps = cfg.evidence.matching_steps
    return calibration.matched(fid, images, real, space, random, steps=steps)


def class_summaries(
    images: ImageSet,
    space: FeatureSpace,
    held_out: Images,
    generated: Images,
    most_pairs: int,
    random: np.random.Generator,
) -> dict[str, list[dict[str, Any]]]:
    """What there is to say class by class; nothing where there are no labels.

    Classes are those of the labels, and those that the classifier gives to held-out and to
    generated images.

    Returns:
      class_histogram: the share of each class, as the mean of its probabilities with a 95 %
        interval (Student's t).
      class_similarity: how alike images of one class are, class by class, and at last images of
        different classes; see `similarities`.
    """
    if not images.classes:
        return {"class_histogram": [], "class_similarity": []}
    probabilities = {
        "labels": images.held_out_labels,
        "held_out": space.embed(held_out)[1],
        "generated": space.embed(generated)[1],
    }
    shares = {
        kind: [calibration.estimate(column) for column in own.T.tolist()]
        for kind, own in probabilities.items()
    }
    alike = {
        kind: similarities(generated if kind == "generated" else held_out, own, most_pairs, random)
        for kind, own in probabilities.items()
    }
    names = [*images.classes, "different classes"]
    return {
        "class_histogram": by_class(names[:-1], shares),
        "class_similarity": by_class(names, alike),
    }


def by_class(names: Sequence[str], columns: dict[str, Any]) -> list[dict[str, Any]]:
    rows = zip(*columns.values(), strict=True)
    return [
        {"class": name, **dict(zip(columns, row, strict=True))}
        for name, row in zip(names, rows, strict=True)
    ]


def similarities(
    pixels: Images,
    probabilities: Float[np.ndarray, "image classes"],
    most_pairs: int,
    random: np.random.Generator,
) -> list[dict[str, float] | None]:
    """MS-SSIM of pairs of images of one class, class by class, and of different classes at last:
    means with 95 % intervals (Student's t), None where there are fewer than `FEWEST_PAIRS`."""
    pairs = class_pairs(probabilities.argmax(axis=1), probabilities.shape[1], random)
    pairs = [own[:most_pairs] for own in pairs]
    values = detectors.pair_similarities(pixels, np.concatenate(pairs))
    parts = np.split(values, np.cumsum([len(own) for own in pairs])[:-1])
    return [
        calibration.estimate(part.tolist()) if len(part) >= FEWEST_PAIRS else None for part in parts
    ]


def class_pairs(
    classes: Int[np.ndarray, " image"], count: int, random: np.random.Generator
) -> list[Int[np.ndarray, "pair 2"]]:
    """Pairs of images of each of `count` classes, and at last of images of different classes.

    No image is in two pairs of one list, so that the pairs in it are independent.
    """
    members = [np.flatnonzero(classes == number) for number in range(count)]
    *same, mixed = (
        random.permutation(own)[: len(own) // 2 * 2].reshape(-1, 2)
        for own in (*members, np.arange(len(classes)))
    )
    return [*same, mixed[classes[mixed[:, 0]] != classes[mixed[:, 1]]]]


def discriminator_summary(
    real: Float[np.ndarray, " held"], generated: Float[np.ndarray, " held"]
) -> dict[str, Any]:
    """The discriminator as a classifier of held-out and generated images.

    Returns:
      confusion: counts, rows are the truth, columns the verdict, generated first, real second.
      report: precision, recall, F1 and support of each class, as scikit-learn reports them.
      accuracy: with its 95 % interval (Wilson), on as many images of either kind.
    """
    from sklearn import metrics  # slow to import

    kinds = ("generated", "real")
    truth = np.repeat(kinds, (len(generated), len(real)))
    verdicts = np.where(np.concatenate([generated, real]) > 0, "real", "generated")
    scores = metrics.precision_recall_fscore_support(truth, verdicts, labels=kinds, zero_division=0)
    report = [
        dict(zip(("class", "precision", "recall", "f1", "support"), row, strict=True))
        for row in zip(kinds, *scores, strict=True)
    ]
    confusion = metrics.confusion_matrix(truth, verdicts, labels=kinds)
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
    generate: calibration.Generate, random: np.random.Generator, latents: int
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
    """The most similar pairs of different images, one above the other (Arora & Zhang, 2017)."""
    pixels = flat(images)
    distances = np.array(detectors.squared_distances(pixels, pixels))
    distances[np.tril_indices(len(images))] = np.inf
    nearest_first = np.argsort(distances, axis=None)[:count]
    return np.stack([images[side] for side in np.unravel_index(nearest_first, distances.shape)])
