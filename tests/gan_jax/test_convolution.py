"""Both ways to write a convolution are the same function, with the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import convolution as conv

# side, channels, filters, kernel, stride, padding: every layer of both networks
LAYERS = [
    (28, 3, 5, 4, 2, (1, 1)),
    (7, 2, 3, 4, 2, (1, 2)),
    (4, 3, 6, 4, 1, (0, 0)),
    (28, 1, 4, 5, 1, (4, 4)),
    (64, 3, 2, 4, 2, (1, 1)),
]


def drawn(*shapes):
    random = np.random.default_rng(0)
    return [jnp.float32(random.normal(size=shape)) for shape in shapes]


def values_and_gradients(apply, direction, images, weights, **place):
    @jax.jit
    def both(images, weights, direction):
        function = functools.partial(apply, **place)
        value, pull_back = jax.vjp(function, images, weights)
        return [value, *pull_back(direction)]

    return both(images, weights, direction)


@pytest.mark.parametrize("side, channels, filters, kernel, stride, padding", LAYERS)
def test_products_equal_xla_in_value_and_gradient(side, channels, filters, kernel, stride, padding):
    images, weights = drawn((2, side, side, channels), (kernel, kernel, channels, filters))
    rows = (side + sum(padding) - kernel) // stride + 1
    (direction,) = drawn((2, rows, rows, filters))
    both = [
        values_and_gradients(apply, direction, images, weights, stride=stride, padding=padding)
        for apply in (conv.convolution_direct, conv.convolution_by_products)
    ]
    for direct, products in zip(*both, strict=True):
        np.testing.assert_allclose(products, direct, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "side, channels, filters, kernel, stride, padding", LAYERS[:1] + LAYERS[2:]
)
def test_transposed_products_equal_xla_in_value_and_gradient(
    side, channels, filters, kernel, stride, padding
):
    rows = (side + sum(padding) - kernel) // stride + 1
    images, weights = drawn((2, rows, rows, filters), (kernel, kernel, channels, filters))
    (direction,) = drawn((2, side, side, channels))
    both = [
        values_and_gradients(apply, direction, images, weights, stride=stride, padding=padding)
        for apply in (conv.transposed_direct, conv.transposed_by_products)
    ]
    for direct, products in zip(*both, strict=True):
        np.testing.assert_allclose(products, direct, rtol=1e-4, atol=1e-3)


def test_convolution_equals_a_loop_over_positions():
    images, weights = drawn((1, 6, 6, 2), (4, 4, 2, 3))
    padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
    expected = np.array(
        [
            [np.einsum("ijc,ijcf->f", padded[r : r + 4, c : c + 4], weights) for c in (0, 2, 4)]
            for r in (0, 2, 4)
        ]
    )
    found = conv.convolution(images, weights, stride=2, padding=(1, 1))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_the_transposed_convolution_is_the_transpose():
    images, weights = drawn((2, 8, 8, 3), (4, 4, 3, 5))
    (direction,) = drawn((2, 4, 4, 5))
    place = {"stride": 2, "padding": (1, 1)}
    forward = jnp.vdot(conv.convolution(images, weights, **place), direction)
    backward = jnp.vdot(images, conv.transposed_convolution(direction, weights, **place))
    np.testing.assert_allclose(forward, backward, rtol=1e-4)


def test_the_platform_decides_which_one_runs(monkeypatch):
    images, weights = drawn((1, 8, 8, 3), (4, 4, 3, 5))
    place = {"stride": 2, "padding": (1, 1)}

    def program():
        return str(jax.make_jaxpr(lambda x, w: conv.convolution(x, w, **place))(images, weights))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "conv_general_dilated" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in program()
