"""Blocks in one loop, as accelerators pass them, beside one after another, as a CPU does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model import layer_loop, sampling
from rlhf_jax.language_model.attention import block_mask
from rlhf_jax.language_model.decoder import Decoder

LORA = LoRAConfig(rank=2, dropout=0.3, targets=("q_proj", "up_proj"))


@pytest.fixture(params=["every weight", "adapters", "layers of three kinds"])
def decoder(model, request):
    """A decoder of three layers, with adapters that do something or without."""
    kinds = {"windowed_layers": (0, 1), "window": 4, "window_rope_theta": 50.0}
    kinds = kinds | {"unrotated_layers": (1,)} if request.param == "layers of three kinds" else {}
    config = dataclasses.replace(model.config, num_layers=3, **kinds)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    if request.param == "adapters":
        decoder.add_adapters(LORA, rngs=nnx.Rngs(1))
        for block in decoder.blocks:
            block.mlp.up_proj.lora_b[...] += 0.1
    return decoder


@pytest.fixture
def both_ways(monkeypatch):
    """A function that calls another without and with the loop, compiled anew."""

    def compare(function, *arguments):
        results = []
        for looped in (False, True):
            monkeypatch.setattr(layer_loop, "looped", lambda looped=looped: looped)
            results.append(jax.jit(lambda *args: function(*args))(*arguments))
        return results

    return compare


def rows():
    tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 250)
    mask = jnp.arange(16)[None] >= jnp.array([0, 3, 7, 1])[:, None]
    return tokens, mask


def assert_close(results, tolerance):
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(one - other).max() <= tolerance * np.abs(one).max()


def test_hidden_states_and_gradients_are_the_same_dropout_included(decoder, both_ways):
    tokens, mask = rows()
    definition, state = nnx.split(decoder)

    def loss(state):
        documents = jnp.where(mask, 0, -1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        visible = block_mask(documents, jnp.zeros_like(documents))
        hidden = nnx.merge(definition, state)(
            tokens, positions, visible, dropout_key=jax.random.key(2)
        )
        hidden = jnp.where(mask[:, :, None], hidden, 0.0)
        return (hidden * jax.random.normal(jax.random.key(3), hidden.shape)).sum(), hidden

    results = both_ways(jax.value_and_grad(loss, has_aux=True), state)
    assert float(jnp.abs(jax.tree.leaves(results[0][1])[0]).max()) > 0.1  # gradients are there
    assert_close(results, 2e-6)


def test_the_same_key_draws_the_same_responses(decoder, both_ways):
    definition, state = nnx.split(decoder)

    def sample(state, key):
        return sampling.begun.__wrapped__(
            state,
            *rows(),
            sampling.draw_keys(key, range(4)),
            1.0,
            decoder_def=definition,
            length=9,
            end=257,
            pad=256,
        ).responses

    responses = both_ways(sample, state, jax.random.key(5))
    np.testing.assert_array_equal(responses[0].tokens, responses[1].tokens)
    assert_close([own.logprobs for own in responses], 5e-6)


def test_the_program_of_a_loop_does_not_grow_with_the_layers(model, monkeypatch):
    monkeypatch.setattr(layer_loop, "looped", lambda: True)
    tokens, mask = rows()

    def products(layers):
        config = dataclasses.replace(model.config, num_layers=layers)
        definition, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

        def loss(state):
            visible = jnp.broadcast_to(mask[:, None], (4, 16, 16))
            return nnx.merge(definition, state)(tokens, jnp.zeros_like(tokens), visible).sum()

        return jax.jit(jax.grad(loss)).lower(state).as_text().count("dot_general")

    assert products(2) == products(5) > 0
