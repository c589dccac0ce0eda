"""Compiled sampling with an explicit cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.language_model.attention import block_mask, blocked
from rlhf_jax.language_model.layer_loop import Stacked, arranged

PREFILL = 16  # rows that are read at a time, at most
WORDS = 256  # whose weights are summed before one of them is drawn


class Responses(NamedTuple):
    """What was sampled after each prompt; aligned, so column t is the t-th response token."""

    tokens: Int[Array, "batch response"]  # `pad` after the end
    mask: Bool[Array, "batch response"]  # True up to and including the end token
    logprobs: Float[Array, "batch response"]  # nats, of the token under the sampling policy


@functools.partial(jax.jit, static_argnames=("temperature", "decoder_def", "length", "end", "pad"))
def sample(
    decoder_state: nnx.State,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    key: Array,
    temperature: float,
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
    blocks = arranged(decoder.blocks)
    hidden, cache = prefill(decoder, blocks, prompts, prompt_mask, length)
    lengths = prompt_mask.sum(axis=1)
    slots, readable = (
        blocked(x, prompt + length) for x in (jnp.arange(prompt + length)[None], prompt_mask)
    )
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
        logits = decoder.logit_columns(hidden)
        token, logprob = pick(jax.random.fold_in(key, index), logits, temperature)
        column = Responses(jnp.where(done, pad, token), ~done, jnp.where(done, 0.0, logprob))
        responses = jax.tree.map(
            lambda all_, one: all_.at[:, index].set(one.astype(all_.dtype)), responses, column
        )
        visible = readable | ((slots >= prompt) & (slots <= prompt + index))
        rope = decoder.rope((lengths + index)[:, None], prompt + length)
        hidden, cache = decoder.step(token, rope, visible, cache, prompt + index, blocks)
        return index + 1, hidden, cache, done | (token == end), responses

    carry = (0, hidden.T, cache, jnp.zeros(batch, bool), empty)
    return jax.lax.while_loop(running, emit, carry)[-1]


def prefill(decoder, blocks, prompts, prompt_mask, length):
    """Hidden states after the prompts, and a cache with room for `length` more tokens.

    A few rows at a time, whose activations stay in a processor's cache.
    """
    time = prompts.shape[1] + length

    def some(part):
        rows, mask = part
        padding = jnp.where(mask, 0, -1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        visible = block_mask(padding, padding)
        hidden, cache = decoder.prefill(rows, positions, visible, time, blocks)
        return hidden[:, -1], cache

    if isinstance(blocks, Stacked):  # an accelerator takes all rows at once
        return some((prompts, prompt_mask))
    size = max(n for n in range(1, PREFILL + 1) if len(prompts) % n == 0)
    filled = jax.lax.map(some, divided((prompts, prompt_mask), size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), filled)


def divided(tree: Any, size: int) -> Any:
    """Every array with its leading axis divided into parts of `size`."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def pick(
    key: Array, logits: Float[Array, "vocab batch"], temperature: float
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """One exact draw per column from softmax(logits / temperature), and its log-probability, nats.

    Inverts the distribution function in two levels, a block of words first, then the word in its
    block: one uniform number is drawn a column, not one a word. At temperature 0 it is the most
    likely word, with its log-probability at temperature 1.
    """
    vocab, batch = logits.shape
    logits = logits / (temperature if temperature > 0 else 1.0)
    top = logits.max(axis=0, keepdims=True)
    padding = ((0, -vocab % WORDS), (0, 0))
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(-1, WORDS, batch)
    sums = jnp.cumsum(jnp.exp(blocks - top[None]).sum(axis=1), axis=0)
    if temperature > 0:
        # 1 - u lies in (0, 1], so that a block or word of weight zero is never drawn
        target = (1 - jax.random.uniform(key, (1, batch))) * sums[-1:]
        block = jnp.minimum((sums < target).sum(axis=0), len(sums) - 1)
        before = jnp.where(block > 0, taken(sums, jnp.maximum(block - 1, 0)), 0.0)
        inside = jnp.take_along_axis(blocks, block[None, None], axis=0)[0]
        words = jnp.cumsum(jnp.exp(inside - top), axis=0)
        word = (words < jnp.minimum(target - before[None], words[-1:])).sum(axis=0)
        token = block * WORDS + word
    else:
        token = logits.argmax(axis=0)
    return token, taken(logits, token) - top[0] - jnp.log(sums[-1])


def taken(x: Float[Array, "rows batch"], rows: Int[Array, "batch"]) -> Float[Array, "batch"]:
    """One entry of each column."""
    return jnp.take_along_axis(x, rows[None], axis=0)[0]
