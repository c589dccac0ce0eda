"""Evidence class by class: pairs within classes, their independence, and what is left out."""

import numpy as np
import pytest

from gan_jax import evaluation


@pytest.fixture
def classes():
    """60 images of two classes: all of the first are equal, those of the second all differ."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    images = random.uniform(-1, 1, (60, 28, 28, 1)).astype(np.float32)
    images[labels == 0] = images[0]
    return images, np.eye(3)[labels]


def test_a_class_without_variety_is_told_from_one_with(classes):
    random = np.random.default_rng(1)
    same, varied, empty, different = evaluation.similarities(*classes, 50, random)
    assert same["mean"] == pytest.approx(1, abs=1e-4) and same["low"] > 0.99
    assert varied["high"] < 0.5 and different["high"] < 0.5
    assert empty is None


def test_no_image_is_in_two_pairs_and_pairs_are_of_one_class_or_of_two():
    random = np.random.default_rng(1)
    classes = random.integers(4, size=41)
    *same, different = evaluation.class_pairs(classes, 5, random)
    assert [len(pairs) for pairs in same] == [np.sum(classes == c) // 2 for c in range(5)]
    for number, pairs in enumerate(same):
        assert len(np.unique(pairs)) == pairs.size and (classes[pairs] == number).all()
    assert len(np.unique(different)) == different.size > 0
    assert (classes[different[:, 0]] != classes[different[:, 1]]).all()


def test_few_pairs_have_no_interval(classes):
    images, labels = classes
    few = np.r_[0:40, 59:60]  # eleven images of the second class: five pairs
    found = evaluation.similarities(images[few], labels[few], 50, np.random.default_rng(1))
    assert found[0] is not None and found[1] is None
