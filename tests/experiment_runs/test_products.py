"""How trained weights are rounded for products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment_runs.products import dithered

WEIGHTS = jax.random.normal(jax.random.key(0), (300, 400))


def back(x):
    assert x.dtype == jnp.bfloat16
    return np.asarray(x.astype("float32"))


def test_a_weight_becomes_one_of_its_two_neighbours_the_nearer_one_more_often():
    found, weights = back(dithered(WEIGHTS, "bfloat16")), np.asarray(WEIGHTS)
    between = 2.0 ** (np.floor(np.log2(np.abs(weights))) - 7)  # two numbers of bfloat16
    off = (found - weights) / between
    assert np.abs(off).max() < 1
    # by 1 - x with the probability x, otherwise by -x
    assert (off * np.sign(weights)).mean() == pytest.approx(0, abs=0.005)
    assert (off**2).mean() == pytest.approx(1 / 6, rel=0.02)  # the mean of x (1 - x)


def test_numbers_of_bfloat16_stay_what_they_are():
    limits = jnp.array([[0.0, -0.0, 1e-40, 3e38, jnp.inf, -jnp.inf]])
    for weights in (WEIGHTS, limits, jnp.zeros((3, 4))):
        rounded = weights.astype("bfloat16").astype("float32")
        np.testing.assert_array_equal(back(dithered(rounded, "bfloat16")), rounded)


def test_what_is_no_number_does_not_become_one():
    """Of all kinds that there are; NVIDIA's has all its bits set, which a draw would carry to 0."""
    bits = np.uint32([[0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001]])
    assert not np.isfinite(back(dithered(jnp.asarray(bits.view("float32")), "bfloat16"))).any()


def test_a_draw_belongs_to_a_place_in_a_matrix():
    found = back(dithered(WEIGHTS, "bfloat16"))
    rows = jnp.array([[5, 299], [0, 5]])
    np.testing.assert_array_equal(back(dithered(WEIGHTS[rows], "bfloat16", rows=rows)), found[rows])
    layers = back(jax.jit(dithered, static_argnums=1)(jnp.stack([WEIGHTS, WEIGHTS]), "bfloat16"))
    np.testing.assert_array_equal(layers, [found, found])
    same = back(dithered(jnp.full((300, 400), 1 + 2.0**-8), "bfloat16"))  # the middle between two
    assert np.abs(np.corrcoef(same)[~np.eye(300, dtype=bool)]).max() < 0.3
    assert np.abs(np.corrcoef(same.T)[~np.eye(400, dtype=bool)]).max() < 0.3


def test_no_draws_are_kept_beside_a_loop_over_steps():
    def step(weights, x):
        return weights - 1e-3 * dithered(weights, "bfloat16").astype("float32") * x, None

    loop = jax.jit(lambda weights, steps: jax.lax.scan(step, weights, steps)[0])
    memory = loop.lower(WEIGHTS, jnp.ones(4)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * WEIGHTS.nbytes


def test_the_gradient_passes_in_float32():
    direction = jax.random.normal(jax.random.key(1), WEIGHTS.shape).astype("bfloat16")
    gradient = jax.grad(lambda x: (dithered(x, "bfloat16") * direction).astype("float32").sum())
    assert gradient(WEIGHTS).dtype == jnp.float32
    np.testing.assert_array_equal(gradient(WEIGHTS), direction.astype("float32"))


def test_what_needs_no_rounding_is_left_alone():
    assert dithered(WEIGHTS, "float32") is WEIGHTS
    halves = WEIGHTS.astype("bfloat16")
    assert dithered(halves, "bfloat16") is halves
