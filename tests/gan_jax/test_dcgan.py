"""The two networks: shapes, normalisation, initial weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gan_jax.dcgan import Discriminator, Generator, drawn

WIDTHS = (8, 6, 4, 3)


@pytest.mark.parametrize("side", [28, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_data_sets_shape_and_one_logit_each(side, channels):
    generator = Generator(latents=5, widths=WIDTHS, side=side, channels=channels)
    discriminator = Discriminator(widths=WIDTHS[::-1], side=side, channels=channels)
    images = jax.eval_shape(
        lambda latents: generator(latents, train=False), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    )
    assert images.shape == (2, side, side, channels)
    logits = jax.eval_shape(lambda images: discriminator(images, train=False), images)
    assert logits.shape == (2,)


def test_the_protocols_widths_follow_the_ladder_of_4_to_32_pixels():
    generator = Generator(latents=100, widths=(512, 256, 128, 64), side=28, channels=3)
    shapes = [block.kernel.shape for block in [*generator.blocks, generator.image]]
    assert shapes == [
        (4, 4, 512, 100), (4, 4, 256, 512), (4, 4, 128, 256), (4, 4, 64, 128), (5, 5, 3, 64),
    ]  # fmt: skip


def test_initial_weights_are_those_of_the_paper():
    params = nnx.split(
        Generator(latents=50, widths=(64, 32, 16, 8), side=28, channels=3), nnx.Param, ...
    )[1]
    found = drawn(params, jax.random.key(0))
    kernel = np.asarray(found["blocks"][0]["kernel"][...])
    assert abs(kernel.mean()) < 5e-4 and abs(kernel.std() - 0.02) < 5e-4
    scales = np.concatenate([np.asarray(norm["scale"][...]) for norm in found["norms"].values()])
    assert abs(scales.mean() - 1) < 0.01 and abs(scales.std() - 0.02) < 0.005
    assert all(not np.any(norm["bias"][...]) for norm in found["norms"].values())


def test_batch_norm_uses_the_batch_in_training_and_the_running_statistics_afterwards():
    module = Discriminator(widths=WIDTHS[::-1], side=28, channels=1)
    definition, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
    params = drawn(params, jax.random.key(0))
    images = jnp.float32(np.random.default_rng(0).normal(size=(6, 28, 28, 1)))

    @functools.partial(jax.jit, static_argnames="train")
    def logits(images, train):
        return nnx.merge(definition, params, statistics, copy=True)(images, train=train)

    assert not np.allclose(logits(images, train=True)[:1], logits(images[:1], train=True))
    together, alone = logits(images, train=False), logits(images[:1], train=False)
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-6)


def test_running_statistics_are_moving_averages_of_batch_statistics():
    module = Discriminator(widths=WIDTHS[::-1], side=28, channels=1)
    module.blocks[0].kernel.set_value(jnp.ones_like(module.blocks[0].kernel[...]))
    images = jnp.float32(np.random.default_rng(0).normal(size=(6, 28, 28, 1)))
    first = module.blocks[0](images)
    norm = module.norms[0]
    norm(first, use_running_average=False)
    np.testing.assert_allclose(
        norm.mean[...], 0.1 * first.mean(axis=(0, 1, 2)), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * first.var(axis=(0, 1, 2)), rtol=1e-3)


@pytest.fixture(scope="module")
def spectral():
    """A discriminator with spectral norm, its directions iterated until they stand."""
    module = Discriminator(widths=WIDTHS[::-1], side=28, channels=3, spectral=True)
    definition, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
    module = nnx.merge(definition, drawn(params, jax.random.key(0)), statistics)
    for _ in range(100):
        module.power_iteration()
    return module


def test_spectral_norm_makes_the_largest_singular_value_one(spectral):
    for layer in [*spectral.blocks, spectral.logit]:
        kernel = np.asarray(layer.scaled_kernel(), np.float64)
        values = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)
        assert values[0] == pytest.approx(1, abs=1e-3)


def test_the_scale_of_kernels_with_spectral_norm_changes_nothing(spectral):
    images = jnp.float32(np.random.default_rng(0).normal(size=(2, 28, 28, 3)))
    before = spectral(images, train=True)
    larger = nnx.merge(*nnx.split(spectral))
    for layer in [*larger.blocks, larger.logit]:
        layer.kernel.set_value(3 * layer.kernel[...])
    np.testing.assert_allclose(larger(images, train=True), before, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_kernel_with_spectral_norm_has_nothing_along_the_kernel(spectral):
    layer = spectral.blocks[1]
    definition, kernel, direction = nnx.split(layer, nnx.Param, nnx.BatchStat)
    images = jnp.float32(np.random.default_rng(0).normal(size=(2, 14, 14, WIDTHS[-1])))

    def loss(kernel):
        return jnp.square(nnx.merge(definition, kernel, direction)(images)).sum()

    grads = jax.grad(loss)(kernel)["kernel"][...]
    along = np.vdot(grads, kernel["kernel"][...])
    assert abs(along) < 1e-3 * np.linalg.norm(grads) * np.linalg.norm(kernel["kernel"][...])
