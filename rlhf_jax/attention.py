"""Grouped-query attention with a gradient of its own, masks, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with no visible key stays finite


def block_mask(
    documents: Int[Array, "batch time"], segments: Int[Array, "batch time"]
) -> Bool[Array, "batch time time"]:
    """Which key each query sees: causal, inside its document, its own segment and the prompt.

    A row may hold several documents, and a document one prompt and several replies that do not
    see each other.

    Args:
      documents: number of the document a token belongs to; -1 is padding.
      segments: 0 on the prompt, k >= 1 on the k-th reply.
    """
    time = jnp.arange(segments.shape[1])
    causal = (time[:, None] >= time[None, :])[None]
    together = documents[:, :, None] == documents[:, None, :]
    keys, queries = segments[:, None, :], segments[:, :, None]
    return causal & together & ((keys == queries) | (keys == 0)) & (documents >= 0)[:, None, :]


def rotary(
    length: int, head_dim: int, theta: float
) -> tuple[Float[np.ndarray, "time half"], Float[np.ndarray, "time half"]]:
    """Cosines and sines of the rotary embedding (Su et al., 2021), in the half-split layout.

    Constants: what XLA can compute, it would compute again for every head of every layer.
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    angles = np.arange(length)[:, None] * theta**-exponents
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    rope: tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]],
) -> Float[Array, "batch time heads head_dim"]:
    """Rotates the pairs (x_i, x_{i + half}) by their position's angles."""
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch time kv_heads head_dim"],
    value: Float[Array, "batch time kv_heads head_dim"],
    mask: Bool[Array, "batch time time"],
) -> Float[Array, "batch time heads head_dim"]:
    """Scaled dot-product attention; the query heads of a group share one key and value head."""
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query = query.reshape(batch, time, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, group * time, head_dim) * head_dim**-0.5
    bias = jnp.where(mask, 0.0, MASKED)[:, None]
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    out = _attend(query, key, value, jnp.tile(bias, (1, 1, group, 1)))
    out = out.reshape(batch, kv_heads, group, time, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, time, heads, head_dim)


# XLA differentiates attention into products over transposed operands, which on a CPU take two to
# three times as long as the same products with the transposes written out.
@jax.custom_vjp
def _attend(query, key, value, bias):
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query, key, value, bias):
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)
    out = weights @ value
    return out, (query, key, value, weights, out)


def _attend_backward(saved, d_out):
    query, key, value, weights, out = saved
    d_weights = jnp.einsum("bhtd,bhsd->bhts", d_out, value)
    d_scores = weights * (d_weights - (d_out * out).sum(axis=-1, keepdims=True))
    d_key = d_scores.swapaxes(-1, -2) @ query
    d_value = weights.swapaxes(-1, -2) @ d_out
    return d_scores @ key, d_key, d_value, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_cached(
    query: Float[Array, "batch heads head_dim"],
    keys: Float[Array, "batch kv_heads head_dim time"],
    values: Float[Array, "batch kv_heads time head_dim"],
    visible: Bool[Array, "batch time"],
) -> Float[Array, "batch heads head_dim"]:
    """Attention of one new token over a cache.

    The axis that is not summed over comes last, so that both products add up whole rows of memory.
    """
    batch, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bhgd,bhds->bhgs", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhgs,bhsd->bhgd", weights, values).reshape(batch, heads, head_dim)
