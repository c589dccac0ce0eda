"""Detectors against closed forms, brute force and independent implementations."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from gan_jax import detectors


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_frechet_distance_has_the_closed_form_of_gaussians(random):
    count, mean, scale = 200_000, np.array([1.0, -2.0]), np.array([1.0, 3.0])
    first = random.normal(size=(count, 2))
    second = mean + scale * random.normal(size=(count, 2))
    # diagonal covariances: |m|^2 + sum (s1 - s2)^2
    expected = np.square(mean).sum() + np.square(scale - 1).sum()
    assert detectors.frechet_distance(first, second) == pytest.approx(expected, rel=0.02)


def test_frechet_distance_to_itself_is_zero_even_with_few_images(random):
    points = random.normal(size=(10, 32))
    assert detectors.frechet_distance(points, points) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_unbiased(random):
    values = [
        float(detectors.kernel_distance(*jnp.asarray(random.normal(size=(2, 40, 8)), jnp.float32)))
        for _ in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_kernel_distance_equals_a_double_loop(random):
    first, second = random.normal(size=(2, 6, 4))

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    def within(points):
        return np.mean(
            [kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j]
        )

    across = np.mean([kernel(x, y) for x in first for y in second])
    expected = within(first) + within(second) - 2 * across
    found = detectors.kernel_distance(jnp.float32(first), jnp.float32(second))
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_manifold_scores_equal_brute_force(random):
    reference, sample = random.normal(size=(20, 3)), 0.5 + random.normal(size=(15, 3))
    k = 3

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - other) for other in points)[k]

    inside = np.array(
        [
            [np.linalg.norm(r - s) <= radius(reference, i) for s in sample]
            for i, r in enumerate(reference)
        ]
    )
    near = np.array(
        [
            [np.linalg.norm(r - s) <= radius(sample, j) for j, s in enumerate(sample)]
            for r in reference
        ]
    )
    found = detectors.manifold_scores(jnp.float32(sample), jnp.float32(reference), neighbours=k)
    expected = {
        "precision": inside.any(axis=0).mean(),
        "recall": near.any(axis=1).mean(),
        "density": inside.sum() / (k * len(sample)),
        "coverage": inside.any(axis=1).mean(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)


def test_two_sample_test_is_fair_sees_a_shift_and_sees_copies(random):
    first, second = jnp.float32(random.normal(size=(2, 300, 5)))
    assert abs(float(detectors.neighbour_accuracy(first, second)) - 0.5) < 0.1
    assert float(detectors.neighbour_accuracy(first + 5, second)) > 0.95
    assert float(detectors.neighbour_accuracy(second, second)) < 0.05


def test_class_divergence_is_zero_for_equal_and_known_for_simple_histograms():
    even, skewed = jnp.array([[0.5, 0.5]] * 4), jnp.array([[0.9, 0.1]] * 4)
    assert float(detectors.class_divergence(even, even)) == pytest.approx(0, abs=1e-6)
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert float(detectors.class_divergence(skewed, even)) == pytest.approx(expected, rel=1e-5)


def test_one_scale_similarity_is_that_of_scikit_image(random):
    first, second = random.uniform(-1, 1, (2, 28, 28)).astype(np.float32)
    second = 0.5 * first + 0.5 * second
    expected = structural_similarity(first, second, data_range=2, use_sample_covariance=False)
    pair = (first[None, :, :, None], second[None, :, :, None])
    assert float(detectors.similarity(*pair, scales=1)[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("side, scales", [(28, 3), (64, 4)])
def test_similarity_uses_the_scales_that_fit_and_is_1_for_equal_images(random, side, scales):
    image = jnp.float32(random.uniform(-1, 1, (1, side, side, 3)))
    noisy = image + jnp.float32(0.3 * random.normal(size=image.shape))
    assert float(detectors.similarity(image, image)[0]) == pytest.approx(1, abs=1e-5)
    assert float(detectors.similarity(image, noisy)[0]) == pytest.approx(
        float(detectors.similarity(image, noisy, scales=scales)[0])
    )


def test_twins_are_the_nearest_other_images():
    images = jnp.array([[0.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
    found = detectors.twin_distances(images)
    expected = np.sqrt(np.array([4, 4, 81]) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nearest_finds_the_image_across_chunks(random, monkeypatch):
    monkeypatch.setattr(detectors, "CHUNK", 16)
    images = random.integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    chosen = np.array([3, 49, 17])
    queries = np.float32(images[chosen] / 127.5 - 1)
    distances, indices = detectors.nearest(queries, images)
    np.testing.assert_array_equal(indices, chosen)
    np.testing.assert_allclose(distances, 0, atol=1e-4)


def test_recited_training_images_are_nearest_to_training_images(random):
    train, held_out = random.integers(0, 256, (2, 40, 4, 4, 1), dtype=np.uint8)
    fresh = random.integers(0, 256, (200, 4, 4, 1), dtype=np.uint8)
    unit = [np.float32(images / 127.5 - 1) for images in (train, fresh)]
    assert detectors.train_nearest_share(unit[0], train, held_out) == 1
    assert abs(detectors.train_nearest_share(unit[1], train, held_out) - 0.5) < 0.15


def test_similarity_within_classes_compares_equal_classes_only(random):
    shapes = jnp.float32(random.uniform(-1, 1, (2, 28, 28, 1)))
    classes = jnp.array([0, 1, 0, 1, 1, 1])
    images = shapes[classes]
    assert float(detectors.within_class_similarity(images, classes)) == pytest.approx(1, abs=1e-5)
    across = float(detectors.similarity(shapes[:1], shapes[1:])[0])
    mixed = detectors.within_class_similarity(images[:2], jnp.array([0, 0]))
    assert float(mixed) == pytest.approx(across) and across < 0.9


def test_pairs_are_compared_across_chunks(random, monkeypatch):
    monkeypatch.setattr(detectors, "PAIRS", 4)
    images = random.uniform(-1, 1, (5, 28, 28, 1)).astype(np.float32)
    pairs = random.integers(5, size=(6, 2))
    expected = detectors.similarity(images[pairs[:, 0]], images[pairs[:, 1]])
    np.testing.assert_allclose(detectors.pair_similarities(images, pairs), expected, rtol=1e-5)


def test_23_images_of_365_hold_twins_in_half_of_all_cases(random):
    modes = random.integers(365, size=2000)
    images = jnp.stack([jnp.float32(10 * modes), jnp.float32(random.uniform(size=2000))], axis=1)
    assert abs(detectors.birthday_size(images, 1.0, random) - 23) <= 3
    assert detectors.support_size(23.0) == pytest.approx(365, rel=1e-3)


def test_the_birthday_size_of_few_images_is_that_of_all_their_subsets(random):
    images = jnp.float32(np.array([[0], [1], [2], [10], [20], [30], [31]]))
    near = np.abs(images - images.T) < 1.5

    def holds_twins(subset):
        return any(near[i, j] for i, j in itertools.combinations(subset, 2))

    shares = [
        np.mean([holds_twins(subset) for subset in itertools.combinations(range(7), size)])
        for size in range(8)
    ]
    expected = int(np.argmax(np.array(shares) >= 0.5))
    assert detectors.birthday_size(images, 1.5, random) == expected


def test_without_twins_the_birthday_size_is_all_images(random):
    images = jnp.float32(np.arange(40)[:, None])
    assert detectors.birthday_size(images, 0.5, random) == 40
