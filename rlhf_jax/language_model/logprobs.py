"""Log-probabilities, entropy and exact KL of given responses, a few hundred rows at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.language_model.attention import block_mask
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.layers import logits

CHUNK = 256  # tokens whose logits exist at the same time


def response_states(
    decoder: Decoder,
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    prompt: int,
    dropout_key: Array | None = None,
) -> Float[Array, "batch response embed"]:
    """Hidden states from which each response token is predicted: position t predicts t + 1."""
    documents = jnp.where(mask, 0, -1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    visible = block_mask(documents, jnp.zeros_like(documents))
    hidden = decoder(tokens, positions, visible, dropout_key=dropout_key)
    return hidden[:, prompt - 1 : -1]


def token_logprobs(
    decoder: Decoder,
    states: Float[Array, "batch time embed"],
    targets: Int[Array, "batch time"],
    temperature: float,
) -> Float[Array, "batch time"]:
    """Log-probability of each target, nats.

    The logits are divided by the temperature that the samples were drawn with (N+). They exist
    for a few tokens at a time and are computed again for the gradient.
    """
    matrix = decoder.output_matrix()

    def chunk(args):
        states, targets = args
        return target_logprobs(states, matrix, targets, temperature)

    return over_chunks(chunk, states, targets)


# JAX's own gradient would pass over the logits several times more.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def target_logprobs(
    states: Float[Array, "rows embed"],
    matrix: Float[Array, "vocab embed"],
    targets: Int[Array, "rows"],
    temperature: float,
) -> Float[Array, "rows"]:
    """Logarithm of the softmax of logits / temperature at one target a row."""
    return _target_forward(states, matrix, targets, temperature)[0]


def _target_forward(states, matrix, targets, temperature):
    scores = logits(states, matrix) / temperature
    total = jax.nn.logsumexp(scores, axis=-1)
    chosen = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    return chosen - total, (states, matrix, targets, total)


def _target_backward(temperature, saved, d_out):
    states, matrix, targets, total = saved
    d_out = d_out[:, None] / temperature
    probabilities = jnp.exp(logits(states, matrix) / temperature - total[:, None])
    d_others, d_chosen = ((x * d_out).astype(states.dtype) for x in (probabilities, 1.0))
    narrow = matrix.astype(states.dtype)
    d_states = d_chosen * narrow[targets] - d_others @ narrow
    d_matrix = -jnp.matmul(d_others.T, states, preferred_element_type=jnp.float32)
    d_matrix = d_matrix.at[targets].add((d_chosen * states).astype(jnp.float32))
    return d_states, d_matrix.astype(matrix.dtype), None


target_logprobs.defvjp(_target_forward, _target_backward)


def compare(
    decoder: Decoder,
    reference: Decoder,
    states: Float[Array, "batch time embed"],
    reference_states: Float[Array, "batch time embed"],
    targets: Int[Array, "batch time"],
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, "batch time"], ...]:
    """Of each target: logprob, the reference's logprob, entropy, exact KL over the vocabulary."""

    def chunk(args):
        *both, targets = args
        scores, others = (
            model.logits(own) / temperature
            for model, own in zip((decoder, reference), both, strict=True)
        )
        total, other_total = (jax.nn.logsumexp(x, axis=-1) for x in (scores, others))
        chosen, other_chosen = (
            jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0] for x in (scores, others)
        )
        probabilities = jnp.exp(scores - total[:, None])
        return (
            chosen - total,
            other_chosen - other_total,
            total - (probabilities * scores).sum(axis=-1),
            (probabilities * (scores - others)).sum(axis=-1) - (total - other_total),
        )

    return over_chunks(chunk, states, reference_states, targets)


def over_chunks(function, *arrays):
    """Applies a function of rows to [batch time ...] arrays, a few hundred rows at a time."""
    batch, time = arrays[0].shape[:2]
    rows = batch * time
    size = min(CHUNK, rows)
    count = -(-rows // size)

    def divide(x):
        x = x.reshape(rows, *x.shape[2:])
        x = jnp.pad(x, [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    results = jax.lax.map(function, tuple(divide(x) for x in arrays))
    return jax.tree.map(lambda x: x.reshape(-1)[:rows].reshape(batch, time), results)
