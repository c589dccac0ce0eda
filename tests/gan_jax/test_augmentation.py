"""Differentiable augmentation: what it may change, how far, and that gradients pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment_runs.errors import UserError
from gan_jax import config, training
from gan_jax.augmentation import POLICIES, augmented

ALL = tuple(POLICIES)


@pytest.fixture(scope="module")
def images():
    return jnp.float32(np.random.default_rng(0).uniform(-1, 1, (64, 28, 28, 3)))


def test_without_a_policy_images_stay_as_they_are(images):
    assert augmented(images, jax.random.key(0), ()) is images


@pytest.mark.parametrize("policy", ALL)
def test_equal_images_are_changed_differently_and_reproducibly(images, policy):
    same = jnp.broadcast_to(images[:1], images.shape)
    first, again = (augmented(same, jax.random.key(1), (policy,)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.asarray(first).reshape(64, -1), axis=0)) > 20
    assert not np.array_equal(first, augmented(same, jax.random.key(2), (policy,)))


def test_colour_changes_each_image_by_one_affine_map_within_its_bounds(images):
    """A pixel's deviation from its own grey is scaled by saturation times contrast, and the
    deviation of that grey from the image's mean by the contrast alone."""
    changed = np.asarray(augmented(images, jax.random.key(3), ("colour",)), np.float64)
    before = np.asarray(images, np.float64)

    def parts(pixels):
        grey = pixels.mean(axis=3, keepdims=True)
        level = grey.mean(axis=(1, 2), keepdims=True)
        return pixels - grey, grey - level, level

    hue, relief, level = (
        [(a * b).sum(axis=(1, 2, 3)) / (a * a).sum(axis=(1, 2, 3)), a, b]
        for a, b in zip(parts(before), parts(changed), strict=True)
    )
    for factors, old, new in (hue, relief):
        np.testing.assert_allclose(new, factors[:, None, None, None] * old, atol=1e-5)
    contrast, saturation = relief[0], hue[0] / relief[0]
    brightness = (level[2] - level[1]).ravel()
    for factors, low, high in ((contrast, 0.5, 1.5), (saturation, 0, 2), (brightness, -0.5, 0.5)):
        assert low <= factors.min() < low + 0.1 * (high - low)
        assert high >= factors.max() > high - 0.1 * (high - low)


def test_translation_moves_whole_images_by_at_most_an_eighth_and_fills_with_grey(images):
    moved = np.asarray(augmented(images, jax.random.key(4), ("translation",)))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifts = []
    for number, image in enumerate(moved):
        fits = [
            (row - 4, column - 4)
            for row in range(9)
            for column in range(9)
            if np.array_equal(image, padded[number, row : row + 28, column : column + 28])
        ]
        shifts.append(*fits)
    assert np.abs(shifts).max() == 4 and {-4, 0, 4} <= set(np.ravel(shifts))


def test_cutout_blanks_one_square_and_leaves_the_rest(images):
    cut = np.asarray(augmented(images, jax.random.key(5), ("cutout",)))
    blank = (cut == 0).all(axis=3)
    np.testing.assert_array_equal(cut[~blank], np.asarray(images)[~blank])
    sides = [blank.any(axis=axis).sum(axis=1) for axis in (1, 2)]
    np.testing.assert_array_equal(blank.sum(axis=(1, 2)), sides[0] * sides[1])
    assert max(map(np.max, sides)) == 14 and min(map(np.min, sides)) >= 7


def test_gradients_pass_to_every_image_where_it_is_seen(images):
    def seen(images):
        return augmented(images, jax.random.key(6), ("translation", "cutout"))

    grads = jax.grad(lambda images: seen(images).sum())(images)
    np.testing.assert_allclose(grads.sum(axis=(1, 2)), seen(jnp.ones_like(images)).sum(axis=(1, 2)))
    assert set(np.unique(grads)) == {0, 1}


@pytest.fixture(scope="module")
def step(tiny):
    """One update under some policies: networks, state before and after, metrics."""
    random = np.random.default_rng(7)
    real = jnp.float32(random.uniform(-1, 1, (tiny.batch, 28, 28, 3)))
    latents = jnp.float32(random.normal(size=(tiny.batch, tiny.latents)))

    @functools.cache
    def started(policies):
        cfg = dataclasses.replace(tiny, augmentation=policies)
        networks, state = training.initial(cfg, channels=3)
        return (
            networks,
            state,
            jax.jit(functools.partial(training.update, networks=networks, cfg=cfg)),
        )

    def run(policies, seed):
        networks, before, update = started(policies)
        after, metrics = update(before, real, latents, jax.random.key(seed))
        return networks, real, latents, before, after, metrics

    return run


def test_training_without_augmentation_does_not_depend_on_its_key(step):
    states = [jax.tree.leaves(step((), seed)[4]) for seed in (0, 1)]
    for first, second in zip(*states, strict=True):
        np.testing.assert_array_equal(first, second)


def test_both_losses_are_those_of_real_and_generated_images_augmented(step):
    networks, real, latents, before, after, metrics = step(ALL, 0)

    def seen(images, draw):
        return augmented(images, jax.random.split(jax.random.key(0), 3)[draw], ALL)

    @jax.jit
    def losses(before, after):
        fake = training.applied(networks.generator, *before.generator[:2], latents)[0]

        def scores(state, images):
            network = state.discriminator
            logits = training.applied(networks.discriminator, *network[:2], images)[0]
            return jax.nn.sigmoid(logits)

        loss_d = -jnp.log(scores(before, seen(real, 0))).mean()
        loss_d -= jnp.log(1 - scores(before, seen(fake, 1))).mean()
        return loss_d, -jnp.log(scores(after, seen(fake, 2))).mean()

    expected = losses(before, after)
    np.testing.assert_allclose([metrics["loss_d"], metrics["loss_g"]], expected, rtol=1e-4)
    plain = step((), 0)[5]
    assert not np.allclose([plain["loss_d"], plain["loss_g"]], expected, rtol=1e-3)


def test_the_generator_learns_through_the_augmentation(step):
    _, _, _, before, after, _ = step(ALL, 0)
    pairs = zip(
        jax.tree.leaves(before.generator.params), jax.tree.leaves(after.generator.params),
        strict=True,
    )  # fmt: skip
    assert all(not np.array_equal(first, second) for first, second in pairs)


def test_an_unknown_policy_is_refused():
    assert ALL == config.POLICIES
    with pytest.raises(UserError, match="augmentation.*'rotation'.*colour, translation, cutout"):
        config.GANConfig(augmentation=("rotation",))
