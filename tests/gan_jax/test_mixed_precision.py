"""A DCGAN whose products have bfloat16 operands, beside the one in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import PROFILES, GANConfig, training
from gan_jax import convolution as conv


@pytest.mark.parametrize("apply", [conv.convolution, conv.transposed_convolution])
def test_a_convolution_and_its_gradients_err_as_rounded_operands_do(apply):
    random = np.random.default_rng(0)
    channels, side = (16, 4) if apply is conv.convolution else (24, 16)
    images = random.normal(size=(4, 8, 8, channels)).astype(np.float32)
    kernel = random.normal(size=(4, 4, 16, 24)).astype(np.float32)
    direction = random.normal(size=(4, side, side, 40 - channels)).astype(np.float32)

    def both(products):
        function = lambda x, k: apply(x, k, stride=2, padding=(1, 1), products=products)  # noqa: E731
        found, pull_back = jax.vjp(function, jnp.asarray(images), jnp.asarray(kernel))
        return [found, *pull_back(jnp.asarray(direction))]

    for mixed, exact in zip(both("bfloat16"), both("float32"), strict=True):
        assert mixed.dtype == jnp.float32
        assert 0 < jnp.linalg.norm(mixed - exact) < 2**-8 * jnp.linalg.norm(exact)


def test_an_update_in_mixed_precision_moves_as_in_float32():
    cfg = dataclasses.replace(PROFILES["tiny"], widths=(32, 16, 16, 8))
    images = jax.random.randint(jax.random.key(1), (64, 28, 28, 3), 0, 256).astype("uint8")
    order = jnp.arange(16).reshape(1, 16)
    metrics = {}
    for precision in ("float32", "mixed"):
        own = dataclasses.replace(cfg, precision=precision)
        networks, state = training.initial(own, 3)
        state, metrics[precision] = training.updates(
            state, images, order, 0, jax.random.key(0), networks=networks, cfg=own
        )
        assert {x.dtype for x in jax.tree.leaves(state.generator.params)} == {jnp.dtype("float32")}
    for name, exact in metrics["float32"].items():
        assert abs(metrics["mixed"][name] - exact) < 0.02 * abs(exact)


def test_the_precision_is_resolved_before_a_run_is_identified(monkeypatch):
    monkeypatch.setenv("RLHF_PRECISION", "mixed")
    assert GANConfig().resolved().precision == "mixed"
    assert PROFILES["tiny"].resolved().precision == "float32"
    monkeypatch.setenv("RLHF_PRECISION", "bfloat16")  # of an accelerator
    assert GANConfig().resolved().precision == "float32"
