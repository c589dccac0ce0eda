"""Grouped-query attention with a gradient of its own, masks, and rotary positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from experiment_runs.products import product
from rlhf_jax.language_model.rope import Scaling, rope_frequencies

BLOCK = 64  # tokens in a block of a cache, at most
WHOLE = 1024  # tokens of a row whose attention weights are kept for the gradient
QUERIES = 256  # queries of a longer row whose weights exist at a time
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
    length: int, head_dim: int, theta: float | None, scaling: Scaling = ()
) -> tuple[Float[np.ndarray, "time half"], Float[np.ndarray, "time half"]]:
    """Cosines and sines of the rotary embedding (Su et al., 2021), in the half-split layout.

    Constants: what XLA can compute, it would compute again for every head of every layer. Without
    a base nothing is turned.
    """
    if theta is None:
        return np.ones((length, head_dim // 2), np.float32), np.zeros(
            (length, head_dim // 2), np.float32
        )
    frequencies, factor = rope_frequencies(head_dim, theta, scaling)
    angles = np.arange(length)[:, None] * frequencies
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    return cos.astype(np.float32), sin.astype(np.float32)


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
    products: str | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Scaled dot-product attention; the query heads of a group share one key and value head.

    Weights of long rows are made for some queries at a time, and again for the gradient (Rabe and
    Staats, 2021), so that memory grows with their length and not with its square.

    Args:
      query, key, value: rotated.
      mask: True where a query sees a key.
      products: dtype of the operands of products; that of the query by default.
    """
    time = query.shape[1]
    if time <= WHOLE:
        return _attend_together(query, key, value, mask, products)
    room = ((0, 0), (0, -time % QUERIES), (0, 0))  # of queries that see nothing
    chunks = tuple(
        jnp.pad(x, room + ((0, 0),) * (x.ndim - 3)).reshape(len(x), -1, QUERIES, *x.shape[2:])
        for x in (query, mask)
    )

    @jax.checkpoint
    def attend_some(own):
        # Bound to the layer's queries, so that no loop over layers keeps a bias for all chunks.
        query, mask = jax.lax.optimization_barrier(own)
        return _attend_together(query, key, value, mask, products)

    out = jax.lax.map(attend_some, tuple(x.swapaxes(0, 1) for x in chunks))
    return out.swapaxes(0, 1).reshape(len(query), -1, *query.shape[2:])[:, :time]


def _attend_together(query, key, value, mask, products):
    """The same of some or all queries of every row, whose weights are kept for the gradient."""
    batch, time, heads, head_dim = query.shape
    dtype = query.dtype
    query, key, value = (x.astype(products or dtype) for x in (query, key, value))
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query = query.reshape(batch, time, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, group * time, head_dim)
    bias = jnp.where(mask, 0.0, MASKED)[:, None]
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    out = _attend(query, key, value, jnp.tile(bias, (1, 1, group, 1)))
    out = out.reshape(batch, kv_heads, group, time, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, time, heads, head_dim).astype(dtype)


# XLA differentiates attention into products over transposed operands, which on a CPU take two to
# three times as long as the same products with the transposes written out. Where the operands are
# in bfloat16, sums and differences are in float32 all the same: where one weight is near 1, the
# gradient of the scores is what is left of two numbers that nearly cancel.
@jax.custom_vjp
def _attend(query, key, value, bias):
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query, key, value, bias):
    scores = product("bhtd,bhsd->bhts", query, key) * query.shape[-1] ** -0.5 + bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)
    out = product("bhts,bhsd->bhtd", weights, value)
    if weights.dtype != jnp.float32:  # after rounding they add up to something near 1
        out = out / weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    return out.astype(value.dtype), (query, key, value, weights, out)


def _attend_backward(saved, d_out):
    query, key, value, weights, out = saved
    d_weights = product("bhtd,bhsd->bhts", d_out, value)
    d_scores = weights * (d_weights - (d_out * out).sum(axis=-1, keepdims=True))
    d_scores, scale = d_scores.astype(query.dtype), query.shape[-1] ** -0.5
    d_query = scale * product("bhts,bhsd->bhtd", d_scores, key)
    d_key = scale * product("bhst,bhtd->bhsd", d_scores.swapaxes(-1, -2), query)
    d_value = product("bhst,bhtd->bhsd", weights.swapaxes(-1, -2), d_out)
    return *(x.astype(query.dtype) for x in (d_query, d_key, d_value)), None


_attend.defvjp(_attend_forward, _attend_backward)


class Cache(NamedTuple):
    """Keys and values of one layer, in blocks of at most BLOCK tokens, for decoding.

    What a product does not sum over comes last, so that it adds up whole rows of memory; the
    blocks keep these rows short enough to be read one after another.
    """

    keys: Float[Array, "batch kv_heads blocks head_dim width"]
    values: Float[Array, "batch kv_heads blocks width head_dim"]


def blocked(x: Shaped[Array, "batch filled *features"], time: int):
    """Padded to `time` tokens or a few more and divided into blocks, [batch blocks width ...]."""
    blocks = -(-time // BLOCK)
    width = -(-time // blocks)
    room = ((0, 0), (0, blocks * width - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, room).reshape(len(x), blocks, width, *x.shape[2:])


def filled_cache(
    key: Float[Array, "batch filled kv_heads head_dim"],
    value: Float[Array, "batch filled kv_heads head_dim"],
    time: int,
) -> Cache:
    """A cache for `time` tokens, of which the first are known."""
    keys, values = blocked(key, time), blocked(value, time)
    return Cache(keys.transpose(0, 3, 1, 4, 2), values.transpose(0, 3, 1, 2, 4))


def grown_cache(
    cache: Cache,
    key: Float[Array, "batch 1 kv_heads head_dim"],
    value: Float[Array, "batch 1 kv_heads head_dim"],
    index: Int[Array, ""],
) -> Cache:
    """The cache with one more token written at `index`."""
    block, place = jnp.divmod(index, cache.keys.shape[-1])
    update, dtype = jax.lax.dynamic_update_slice, cache.keys.dtype
    key, value = key.astype(dtype), value.astype(dtype)
    keys = update(cache.keys, key.transpose(0, 2, 1, 3)[..., None], (0, 0, block, 0, place))
    values = update(cache.values, value.transpose(0, 2, 1, 3)[:, :, None], (0, 0, block, place, 0))
    return Cache(keys, values)


def attend_cached(
    query: Float[Array, "batch heads head_dim"],
    cache: Cache,
    visible: Bool[Array, "batch blocks width"],
) -> Float[Array, "batch heads head_dim"]:
    """Attention of one new token over a cache, whose dtype the products' operands have."""
    batch, heads, head_dim = query.shape
    query, dtype = query.astype(cache.keys.dtype), query.dtype
    kv_heads, blocks = cache.keys.shape[1:3]
    group = heads // kv_heads
    query = query.reshape(batch, kv_heads, 1, group, head_dim)
    query = jnp.broadcast_to(query, (batch, kv_heads, blocks, group, head_dim))
    query = jax.lax.optimization_barrier(query)  # a product for every block
    scores = product("bhngd,bhnds->bhngs", query, cache.keys) * head_dim**-0.5
    scores = jnp.where(visible[:, None, :, None], scores, MASKED)
    weights = jnp.exp(scores - scores.max(axis=(2, 4), keepdims=True)).astype(query.dtype)
    out = product("bhngs,bhnsd->bhngd", weights, cache.values).sum(axis=2)
    out = out / weights.sum(axis=(2, 4), dtype=jnp.float32)[..., None]
    return out.astype(dtype).reshape(batch, heads, head_dim)
