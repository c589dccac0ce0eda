"""The detectors detect what was planted, and only the draws decide."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats

from gan_jax import calibration, detectors
from gan_jax.calibration import RealImages
from gan_jax.config import EvidenceConfig
from gan_jax.features import FeatureSpace, feature_space
from gan_jax.training import to_unit

CFG = EvidenceConfig(images=80, draws=12)
STRENGTHS = calibration.Matched(fid=0.0, noise=0.3, blur=0.025)


def embed(images):
    """Means of 7 x 7 pixels as features; the class is the brightness."""
    blocks = images.reshape(len(images), 4, 7, 4, 7, 3).mean(axis=(2, 4))
    shade = np.round((images.mean(axis=(1, 2, 3)) + 1) * 127.5 / 30).clip(0, 6).astype(int)
    return blocks.reshape(len(images), -1), 0.93 * np.eye(7, dtype=np.float32)[shade] + 0.01


def imitation(latents):
    """Squares like the real ones: every cell of the latents' space has its own noise."""
    shade = np.floor(7 * stats.norm.cdf(latents[:, 0])).clip(0, 6)
    cells = np.round(latents).astype(int) + 100
    noise = np.stack([np.random.default_rng(cell).normal(0, 20, (28, 28, 3)) for cell in cells])
    return to_unit(np.uint8((30 * shade[:, None, None, None] + noise).clip(0, 255)))


@pytest.fixture(scope="module")
def values(squares):
    space = FeatureSpace("means", embed, {})
    real = calibration.real_images(squares, np.random.default_rng(0), CFG)
    sets = calibration.scenarios(squares, imitation, 16, STRENGTHS)
    return calibration.measured(sets, real, space, CFG, [0])


@pytest.fixture(scope="module")
def table(values):
    rows = calibration.calibration_table(values)
    return {(row["scenario"], row["detector"]): row for row in rows}


def caught(table, scenario):
    return {
        name for (where, name), row in table.items() if where.startswith(scenario) and row["caught"]
    }


def test_other_draws_of_real_images_are_caught_by_nothing(table):
    assert caught(table, calibration.AGAIN) == set()
    again, real = (table[name, "fid"]["mean"] for name in (calibration.AGAIN, "real"))
    assert again != real


def test_real_and_other_real_images_share_no_image_in_any_draw(squares):
    real = calibration.real_images(squares, np.random.default_rng(0), CFG)
    seen = []

    def scenario(random, own, count):
        seen.append(own)
        return to_unit(squares.held_out[own[:count]])

    sets = {"real": scenario, calibration.AGAIN: scenario, "third": scenario}
    calibration.measured(sets, real, FeatureSpace("means", embed, {}), CFG, [0])
    for own, again, third in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert not set(own) & set(again) and set(again) == set(third)
        assert max(*own, *again) < real.pool and min(len(own), len(again)) >= real.count
    assert set(seen[0]) != set(seen[3])  # divided anew


def test_blurred_real_images_lose_detail_and_no_image(squares):
    sets = calibration.scenarios(squares, imitation, 16, STRENGTHS)
    own = np.arange(30)
    sharp, blurred = (sets[n](np.random.default_rng(0), own, 20) for n in ("real", "real, blurred"))
    np.testing.assert_allclose(blurred.mean(axis=(1, 2)), sharp.mean(axis=(1, 2)), atol=0.01)
    assert np.abs(np.diff(blurred, axis=1)).mean() < 0.6 * np.abs(np.diff(sharp, axis=1)).mean()


def rough(images):
    """Deviations of rows of pixels as features: noise raises them, blur lowers them."""
    return images.std(axis=2).reshape(len(images), -1), None


def test_noise_and_blur_are_as_far_from_real_images_as_the_generator(squares):
    space = FeatureSpace("deviations", rough, {})
    real = calibration.real_images(squares, np.random.default_rng(0), CFG)
    held_out, train = (
        calibration.pick(images, np.random.default_rng(0), 80)
        for images in (squares.held_out[: real.pool], squares.train)
    )
    reference = space.embed(train)[0]

    def fid(pixels):
        return detectors.frechet_distance(space.embed(pixels)[0], reference)

    wanted = fid(calibration.blurred(held_out, 0.02))
    assert wanted > 1.5 * fid(held_out)
    random = np.random.default_rng(0)
    found = calibration.matched(wanted, squares, real, space, random, steps=8)
    noise = found.noise * random.normal(size=held_out.shape)
    for name, pixels in (
        ("noise", calibration.noisy(held_out, noise)),
        ("blur", calibration.blurred(held_out, found.blur)),
    ):
        assert fid(pixels) == pytest.approx(wanted, rel=0.3), name
    assert found.blur == pytest.approx(0.02, rel=0.3)
    far = calibration.matched(np.inf, squares, real, space, random, steps=2)
    assert far == (np.inf, calibration.MOST_NOISE, calibration.MOST_BLUR)


def drawn_table(shift, seed, draws=10):
    """A table of 40 detectors of independent normal draws; the scenario is shifted by so much."""
    random = np.random.default_rng(seed)
    values = {
        name: {f"d{i}": (random.normal(size=draws) + (name != "real") * shift).tolist()
               for i in range(40)}
        for name in ("real", "scenario")
    }  # fmt: skip
    rows = calibration.calibration_table(values)
    return [row["caught"] for row in rows if row["scenario"] == "scenario"]


def test_without_a_difference_anything_is_caught_in_a_twentieth_of_all_tables():
    alarms = sum(any(drawn_table(0.0, seed)) for seed in range(400))
    assert 4 <= alarms <= 36  # 20 expected, four deviations around it


def test_a_shift_that_a_single_draw_would_hide_is_seen():
    """A mean of draws beside the range of one would show a shift of 1.5 deviations in few cases."""
    assert np.mean([drawn_table(3.0, seed) for seed in range(50)]) > 0.8
    assert np.mean([drawn_table(1.5, seed, draws=30) for seed in range(50)]) > 0.9


def test_holm_rejects_what_its_step_down_procedure_rejects():
    random = np.random.default_rng(0)
    p_values = (random.uniform(size=12) ** 3).tolist()
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values)):
            if p_values[index] > level / (12 - rank):
                break
            rejected.add(index)
        adjusted = calibration.holm(p_values)
        assert rejected == {i for i, p in enumerate(adjusted) if p <= level}


def test_draws_that_never_differ_differ_by_chance_alone_and_a_constant_difference_does_not():
    assert calibration.difference_p([1.0, 2.0], [1.0, 2.0]) == 1
    assert calibration.difference_p([2.0, 3.0], [1.0, 2.0]) == 0


def test_repeated_images_are_caught_as_collapse(table):
    found = caught(table, "10 real images repeated")
    assert {"twins", "recall", "coverage", "nn_accuracy"} <= found
    assert table["10 real images repeated", "twins"]["mean"] == 1


def test_copies_of_training_images_are_caught_by_their_neighbours_and_not_by_fid(table):
    found = caught(table, "copies of training images")
    assert "train_nearest" in found and "fid" not in found
    assert table["copies of training images", "train_nearest"]["mean"] == 1


def test_a_collapsed_generator_is_caught_by_more_than_an_honest_one(table):
    assert "twins" not in caught(table, "generated")
    assert len(caught(table, "generator collapsed")) > len(caught(table, "generated"))


def test_a_missing_class_is_caught_by_the_class_histogram(table):
    assert "class_divergence" in caught(table, "without")


def test_without_labels_no_detector_needs_a_class(squares):
    unlabelled = squares.__class__(
        name="u", source="", train=squares.train, held_out=squares.held_out
    )
    space = feature_space(unlabelled, jax.random.key(0), steps=1)
    real, random = (
        RealImages(squares.train, squares.held_out, 0.1, 20, 40),
        np.random.default_rng(0),
    )
    sample = to_unit(squares.held_out[:20])
    found = calibration.measure(sample, space.embed(sample), space.embed(sample), real, 3, random)
    assert "class_divergence" not in found and found["fid"] == pytest.approx(0, abs=1e-3)
    names = calibration.scenarios(unlabelled, lambda latents: sample, 4, STRENGTHS)
    assert not any(name.startswith("without") for name in names)


def test_the_birthday_test_finds_how_many_images_are_repeated(values):
    rows = calibration.birthday_table(values, CFG.images)
    rows = {row["scenario"]: row for row in rows}
    repeated = rows["10 real images repeated"]
    assert repeated["support"]["low"] <= 10 <= repeated["support"]["high"]
    assert repeated["size"]["low"] >= 2 and not repeated["bounded"]
    assert rows["real"]["support"]["mean"] > 5 * repeated["support"]["mean"]


def test_a_draw_without_twins_bounds_the_support_from_below():
    values = {"a": {"birthday": [80.0, 30.0]}, "b": {"birthday": [20.0, 30.0]}}
    bounded, exact = calibration.birthday_table(values, 80)
    assert bounded["bounded"] and not exact["bounded"]


def test_intervals_are_those_of_student():
    draws = [1.0, 2.0, 3.0, 4.0]
    deviation = np.std(draws, ddof=1)
    low, high = calibration.interval(draws, of_mean=True)
    assert (low + high) / 2 == 2.5 and high - 2.5 == pytest.approx(3.1824 * deviation / 2, rel=1e-4)
    low, high = calibration.interval(draws, of_mean=False)
    assert high - 2.5 == pytest.approx(3.1824 * deviation * np.sqrt(1.25), rel=1e-4)


def test_the_classifier_learns_the_classes(squares):
    space = feature_space(squares, jax.random.key(0), steps=40)
    assert space.accuracy["low"] > space.accuracy["majority"] + 0.2
    features, probabilities = space.embed(to_unit(squares.held_out[:5]))
    assert features.shape == (5, 64)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_of_images_of_one_class_no_class_is_left_out(squares):
    one = np.zeros_like(squares.held_out_labels)
    one[:, 0] = 1
    images = dataclasses.replace(squares, held_out_labels=one)
    names = calibration.scenarios(images, imitation, 16, STRENGTHS)
    assert not any(name.startswith("without") for name in names)


def test_without_a_class_no_image_is_drawn_twice_either(squares):
    """Two classes of about the same size: half of every half is left."""
    train, held_out = (
        np.eye(2, dtype=np.float32)[np.arange(len(own)) % 2]
        for own in (squares.train, squares.held_out)
    )
    labels = {"train_labels": train, "held_out_labels": held_out}
    images = dataclasses.replace(squares, classes=("a", "b"), **labels)
    cfg = EvidenceConfig(images=10_000, draws=2)
    real = calibration.real_images(images, np.random.default_rng(0), cfg)
    whole = calibration.real_images(
        dataclasses.replace(images, classes=(), train_labels=None, held_out_labels=None),
        np.random.default_rng(0),
        cfg,
    )
    sets = calibration.scenarios(images, imitation, 16, STRENGTHS)
    (name,) = (name for name in sets if name.startswith("without"))
    for seed in range(20):
        random = np.random.default_rng(seed)
        own, _ = np.array_split(random.permutation(real.pool), 2)
        assert len(np.unique(sets[name](random, own, real.count), axis=0)) == real.count
    assert real.count < 0.5 * whole.count


def test_images_with_other_labels_or_names_of_classes_are_another_input(squares):
    held_out, train = (
        np.roll(labels, 1, axis=1) for labels in (squares.held_out_labels, squares.train_labels)
    )
    changed = [
        squares,
        dataclasses.replace(squares, held_out_labels=held_out),
        dataclasses.replace(squares, train_labels=train),
        dataclasses.replace(squares, classes=squares.classes[::-1]),
    ]
    assert len({images.fingerprint for images in changed}) == len(changed)
