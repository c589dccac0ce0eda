"""What is computed from a policy's hidden states, and what of it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax import policy
from rlhf_jax.model import LoRAConfig
from rlhf_jax.pretrained import leaf_name

BATCH, TIME = 3, 100  # more tokens than one chunk holds, and not a multiple


@pytest.fixture(scope="module")
def states(toy):
    draw = jax.random.normal(jax.random.key(0), (2, BATCH, TIME, toy.config.embed_dim))
    targets = jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, toy.config.vocab_size)
    return *draw, targets


def names(state):
    return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_and_their_gradient_are_those_of_the_whole(toy, states, temperature):
    hidden, _, targets = states
    table = toy.state["embedding"][...]

    def chunked(hidden, table):
        decoder = nnx.merge(toy.definition, toy.state)
        decoder.embedding[...] = table
        logprobs, entropy = policy.token_logprobs(decoder, hidden, targets, temperature)
        return (logprobs**2).sum(), (logprobs, entropy)

    def whole(hidden, table):
        logs = jax.nn.log_softmax(hidden @ table.T / temperature)
        logprobs = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
        return (logprobs**2).sum(), (logprobs, -(jnp.exp(logs) * logs).sum(-1))

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, table)
        for f in (chunked, whole)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_exact_kl_is_that_of_the_two_distributions(toy, states):
    hidden, other, targets = states
    decoder = nnx.merge(toy.definition, toy.state)

    @jax.jit
    def both(hidden, other):
        logs, others = (jax.nn.log_softmax(decoder.logits(x) / 0.7) for x in (hidden, other))
        chosen = [jnp.take_along_axis(x, targets[..., None], -1)[..., 0] for x in (logs, others)]
        entropy, kl = -(jnp.exp(logs) * logs).sum(-1), (jnp.exp(logs) * (logs - others)).sum(-1)
        found = policy.compare(decoder, decoder, hidden, other, targets, 0.7)
        return found, (*chosen, entropy, kl)

    for ours, theirs in zip(*both(hidden, other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_response_token_is_predicted_from_the_position_before_it(toy):
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 4, 12)
    mask = jnp.ones((2, 9), bool)
    decoder = nnx.merge(toy.definition, toy.state)
    states = policy.response_states(decoder, tokens, mask, 5)
    for t in range(4):
        alone = policy.response_states(decoder, tokens[:, : 5 + t + 1], mask[:, : 5 + t + 1], 5 + t)
        np.testing.assert_allclose(states[:, t], alone[:, 0], atol=1e-5)


def test_full_training_trains_every_parameter(toy):
    built = policy.build(toy, None, seed=0)
    decoder = {f"decoder.{name}" for name in names(toy.state)}
    assert names(built.trainable) == decoder | {"value.kernel", "value.bias"}
    assert not names(built.frozen)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")])
def test_lora_trains_its_factors_and_the_value_head_and_nothing_else(toy, targets):
    built = policy.build(toy, LoRAConfig(targets=targets), seed=0)
    factors = {
        f"decoder.blocks.0.{'attention' if name in 'q_proj v_proj o_proj' else 'mlp'}.{name}.{f}"
        for name in targets
        for f in ("lora_a", "lora_b")
    }
    assert names(built.trainable) == factors | {"value.kernel", "value.bias"}
    assert names(built.frozen) == {f"decoder.{name}" for name in names(toy.state)}


def test_the_critic_starts_at_zero(toy, states):
    built = policy.build(toy, None, seed=0)
    assert not nnx.merge(*built).values(states[0]).any()
