"""Compiled sampling with an explicit cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.attention import block_mask

PREFILL = 16  # rows that are read at a time, at most


class Responses(NamedTuple):
    """What was sampled after each prompt; aligned, so column t is the t-th response token."""

    tokens: Int[Array, "batch response"]  # `pad` after the end
    mask: Bool[Array, "batch response"]  # True up to and including the end token
    logprobs: Float[Array, "batch response"]  # nats, of the token under the sampling policy


@functools.partial(jax.jit, static_argnames=("decoder_def", "length", "end", "pad"))
def sample(
    decoder_state: nnx.State,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    key: Array,
    temperature: float | Float[Array, ""],
    *,
    decoder_def: nnx.GraphDef,
    length: int,
    end: int,
    pad: int,
) -> Responses:
    """Samples one response per prompt from softmax(logits / temperature), nothing cut off.

    The loop stops early when every response has ended.

    Args:
      decoder_state: the policy's decoder, adapters included.
      prompts: padded on the left.
      prompt_mask: True on the prompt's tokens.
      key: the draws; the same key gives the same responses.
      temperature: 0 takes the most likely token.
      decoder_def: the static half of the decoder.
      length: the longest response, in tokens.
      end: the token that ends a response; it is part of it.
      pad: fills what follows the end.
    """
    decoder = nnx.merge(decoder_def, decoder_state)
    batch, prompt = prompts.shape
    hidden, cache = prefill(decoder, prompts, prompt_mask, length)
    lengths = prompt_mask.sum(axis=1)
    slots = jnp.arange(prompt + length)[None]
    readable = jnp.pad(prompt_mask, ((0, 0), (0, length)))
    empty = Responses(
        jnp.full((batch, length), pad, prompts.dtype),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
    )

    def running(carry):
        index, _, _, done, _ = carry
        return (index < length) & ~done.all()

    def emit(carry):
        index, hidden, cache, done, responses = carry
        logits = decoder.logits(hidden) / jnp.where(temperature > 0, temperature, 1.0)
        logits = logits - logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits)
        token = jax.lax.cond(
            temperature > 0,
            lambda: categorical(jax.random.fold_in(key, index), weights),
            lambda: logits.argmax(axis=-1),
        )
        logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = logprob - jnp.log(weights.sum(axis=-1))
        column = Responses(jnp.where(done, pad, token), ~done, jnp.where(done, 0.0, logprob))
        responses = jax.tree.map(
            lambda all_, one: all_.at[:, index].set(one.astype(all_.dtype)), responses, column
        )
        visible = readable | ((slots >= prompt) & (slots <= prompt + index))
        rope = decoder.rope((lengths + index)[:, None], prompt + length)
        hidden, cache = decoder.step(token, rope, visible, cache, prompt + index)
        return index + 1, hidden, cache, done | (token == end), responses

    carry = (0, hidden, cache, jnp.zeros(batch, bool), empty)
    return jax.lax.while_loop(running, emit, carry)[-1]


def prefill(decoder, prompts, prompt_mask, length):
    """Hidden states after the prompts, and a cache with room for `length` more tokens.

    A few rows at a time, whose activations stay in a processor's cache.
    """
    room = ((0, 0), (0, length), (0, 0), (0, 0))

    def some(part):
        rows, mask = part
        padding = jnp.where(mask, 0, -1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden, cache = decoder.forward(rows, positions, block_mask(padding, padding))
        return hidden[:, -1], [
            (jnp.pad(key, room).transpose(0, 2, 3, 1), jnp.pad(value, room).transpose(0, 2, 1, 3))
            for key, value in cache
        ]

    size = max(n for n in range(1, PREFILL + 1) if len(prompts) % n == 0)
    filled = jax.lax.map(some, divided((prompts, prompt_mask), size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), filled)


def divided(tree: Any, size: int) -> Any:
    """Every array with its leading axis divided into parts of `size`."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def categorical(key: Array, weights: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """One exact draw per row, in proportion to its weights, by inverting the distribution function.

    It needs one uniform number a row, not one a word, and sums in two levels: a block of words
    first, then the word in its block.
    """
    batch, vocab = weights.shape
    width = 256
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % width))).reshape(batch, -1, width)
    blocks = jnp.cumsum(weights.sum(axis=-1), axis=-1)
    # 1 - u lies in (0, 1], so that a block or word of weight zero is never drawn
    target = (1 - jax.random.uniform(key, (batch, 1))) * blocks[:, -1:]
    block = jnp.minimum((blocks < target).sum(axis=-1), blocks.shape[1] - 1)[:, None]
    before = jnp.where(block > 0, jnp.take_along_axis(blocks, jnp.maximum(block - 1, 0), 1), 0.0)
    inside = jnp.take_along_axis(weights, block[:, :, None], axis=1)[:, 0]
    words = jnp.cumsum(inside, axis=-1)
    target = jnp.minimum(target - before, words[:, -1:])
    word = (words < target).sum(axis=-1)
    return block[:, 0] * width + word
