"""Log-probabilities, entropy and exact KL of given responses, a few hundred rows at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiment_runs import devices
from experiment_runs.products import dithered, product
from rlhf_jax.language_model.attention import block_mask
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.layers import logits

CHUNK = 256  # tokens whose logits exist at the same time, on each device


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
    matrix, states = decoder.output_matrix(), states.astype(decoder.cfg.products)

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
    scores = logits(states, matrix) / temperature
    # 1 - p of a target that is nearly certain has few digits left: it is taken before any rounding.
    target = jnp.arange(scores.shape[1])[None] == targets[:, None]
    d_scores = (target - jnp.exp(scores - total[:, None])) * (d_out[:, None] / temperature)
    d_scores = d_scores.astype(states.dtype)
    d_states = product("rv,ve->re", d_scores, dithered(matrix, states.dtype))
    d_matrix = product("vr,re->ve", d_scores.T, states)
    return d_states.astype(states.dtype), d_matrix.astype(matrix.dtype), None


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
    """Applies a function of rows to [batch time ...] arrays, a few hundred rows at a time.

    A chunk is a few columns of every row, so that of rows on several devices each works on its own.
    It is as large on each of them as on one: the gradient of the output matrix, which is summed
    over devices for every chunk, is as large for few tokens as for many.
    """
    batch, time = arrays[0].shape[:2]
    count = min(-(-batch * time // (CHUNK * devices.rows_parted())), time)
    columns = -(-time // count)

    def divide(x):
        x = jnp.pad(x, [(0, 0), (0, count * columns - time)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, count, columns, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(count, batch * columns, *x.shape[3:])

    def join(x):
        x = x.reshape(count, batch, columns).swapaxes(0, 1)
        return x.reshape(batch, count * columns)[:, :time]

    return jax.tree.map(join, jax.lax.map(function, tuple(divide(x) for x in arrays)))
