"""What is computed from a policy's hidden states, and what of it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment_runs import devices
from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.logprobs import token_logprobs
from rlhf_jax.ppo import actor_critic
from rlhf_jax.pretrained.tensor_names import leaf_name

BATCH, TIME = 3, 100  # more tokens than one chunk holds, and not a multiple


@pytest.fixture(scope="module")
def states(toy):
    draw = jax.random.normal(jax.random.key(0), (2, BATCH, TIME, toy.config.embed_dim))
    targets = jax.random.randint(jax.random.key(1), (BATCH, TIME), 0, toy.config.vocab_size)
    return *draw, targets


def names(state):
    return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize(
    ("temperature", "dtype", "tolerance"),
    [(1.0, "float32", 1e-5), (0.7, "float32", 1e-5), (0.7, "bfloat16", 2e-2)],
)
def test_chunked_logprobs_and_their_gradient_are_those_of_the_whole(
    toy, states, temperature, dtype, tolerance
):
    hidden, _, targets = states
    hidden = hidden.astype(dtype)

    def chunked(hidden, state):
        decoder = nnx.merge(toy.definition, state)
        logprobs = token_logprobs(decoder, hidden, targets, temperature)
        return (logprobs**2).sum(), logprobs

    def whole(hidden, state):
        matrix = state["unembedding"][...].astype(dtype)
        whole_logits = jnp.matmul(hidden, matrix.T, preferred_element_type=jnp.float32)
        logs = jax.nn.log_softmax(whole_logits / temperature)
        logprobs = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
        return (logprobs**2).sum(), logprobs

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, toy.state)
        for f in (chunked, whole)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("certainty", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_in_bfloat16_the_gradient_of_a_likely_target_errs_no_more_than_jax_s_own(certainty):
    """From p = 1/V to 1 - 1e-4 and more. Against float32 on the same inputs, by the norm."""
    rows, vocab, embed, temperature = 64, 300, 32, 0.8
    matrix = jax.random.normal(jax.random.key(0), (vocab, embed)).astype("bfloat16")
    targets = jax.random.randint(jax.random.key(1), (rows,), 0, vocab)
    noise = jax.random.normal(jax.random.key(2), (rows, embed))
    states = (certainty * matrix[targets] / 4 + 0.1 * noise).astype("bfloat16")
    direction = jax.random.normal(jax.random.key(3), (rows,))

    def own(states, matrix):
        return logprobs.target_logprobs(states, matrix, targets, temperature)

    def plain(states, matrix):
        scores = jnp.einsum(
            "re,ve->rv", states, matrix.astype(states.dtype), preferred_element_type=jnp.float32
        )
        logs = jax.nn.log_softmax(scores / temperature)
        return jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0]

    wide = matrix.astype("float32")
    exact = jax.vjp(plain, states.astype("float32"), wide)[1](direction)
    for function in (own, plain):
        found = jax.vjp(function, states, wide)[1](direction)
        assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
        for ours, truth in zip(found, exact, strict=True):
            assert float(jnp.linalg.norm(ours - truth)) <= 0.006 * float(jnp.linalg.norm(truth))


def test_the_exact_kl_is_that_of_the_two_distributions(toy, states):
    hidden, other, targets = states
    decoder = nnx.merge(toy.definition, toy.state)

    @jax.jit
    def both(hidden, other):
        logs, others = (jax.nn.log_softmax(decoder.logits(x) / 0.7) for x in (hidden, other))
        chosen = [jnp.take_along_axis(x, targets[..., None], -1)[..., 0] for x in (logs, others)]
        entropy, kl = -(jnp.exp(logs) * logs).sum(-1), (jnp.exp(logs) * (logs - others)).sum(-1)
        found = logprobs.compare(decoder, decoder, hidden, other, targets, 0.7)
        return found, (*chosen, entropy, kl)

    for ours, theirs in zip(*both(hidden, other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_response_token_is_predicted_from_what_stands_before_it_and_nothing_else(toy):
    tokens = jax.random.randint(jax.random.key(2), (9,), 4, 11)
    changed = tokens[None] + jnp.eye(9, dtype=int)  # row i differs in token i
    rows = jnp.concatenate([tokens[None], changed])
    decoder = nnx.merge(toy.definition, toy.state)
    states = jax.jit(lambda rows: logprobs.response_states(decoder, rows, rows > 0, 5))(rows)
    differs = np.asarray(jnp.abs(states[1:] - states[0][None]).max(axis=-1) > 1e-6)
    for response_token in range(4):
        assert differs[:, response_token].tolist() == [True] * (5 + response_token) + [False] * (
            4 - response_token
        )


def test_full_training_trains_every_parameter(toy):
    built = actor_critic.build(toy, None, seed=0)
    decoder = {f"decoder.{name}" for name in names(toy.state)}
    assert names(built.trainable) == decoder | {"value.kernel", "value.bias"}
    assert not names(built.frozen)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")])
def test_lora_trains_its_factors_and_the_value_head_and_nothing_else(toy, targets):
    built = actor_critic.build(toy, LoRAConfig(targets=targets), seed=0)
    factors = {
        f"decoder.blocks.0.{'attention' if name in 'q_proj v_proj o_proj' else 'mlp'}.{name}.{f}"
        for name in targets
        for f in ("lora_a", "lora_b")
    }
    assert names(built.trainable) == factors | {"value.kernel", "value.bias"}
    assert names(built.frozen) == {f"decoder.{name}" for name in names(toy.state)}


def test_the_critic_starts_at_zero(toy, states):
    built = actor_critic.build(toy, None, seed=0)
    assert not nnx.merge(*built).value(states[0]).any()


def test_a_chunk_is_as_large_on_every_device_as_on_one():
    """For every chunk the gradient of the whole output matrix is summed over the devices."""
    rows = jnp.zeros((8, logprobs.CHUNK, 4))

    def chunks():
        program = jax.make_jaxpr(lambda x: logprobs.over_chunks(lambda own: own[0].sum(-1), x))
        (loop,) = (step for step in program(rows).eqns if step.primitive.name == "scan")
        return loop.params["length"]

    assert chunks() == 8
    with devices.placement():
        assert chunks() == 8 // devices.data_size() < 8
