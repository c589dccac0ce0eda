"""Compiled sampling with an explicit cache."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from experiment_runs import devices
from rlhf_jax.language_model import layer_loop
from rlhf_jax.language_model.attention import block_mask, blocked
from rlhf_jax.language_model.decoder import for_products
from rlhf_jax.language_model.layer_loop import Stacked, arranged

PREFILL = 16  # rows that are read at a time, at most
WORDS = 256  # whose weights are summed before one of them is drawn
FEWEST = 8  # rows that are decoded together: with fewer a step takes as long
SHORT = 32  # tokens that are left, for which nothing else is compiled


class Responses(NamedTuple):
    """What was sampled after each prompt; aligned, so column t is the t-th response token."""

    tokens: Int[Array, "batch response"]  # `pad` after the end
    mask: Bool[Array, "batch response"]  # True up to and including the end token
    logprobs: Float[Array, "batch response"]  # nats, of the token under the sampling policy


class Decoding(NamedTuple):
    """How far some rows have been decoded."""

    index: Int[Array, ""]  # of the response token that comes next
    hidden: Float[Array, "embed rows"]
    cache: Any  # of each block; rows first, or after the layers
    done: Bool[Array, "rows"]
    lengths: Int[Array, "rows"]  # of the prompts, in tokens
    readable: Bool[Array, "rows blocks width"]  # where the prompts' tokens are
    draws: Float[Array, "rows response"]
    responses: Responses


def sample(
    decoder_state: nnx.State,
    prompts: Int[Array | np.ndarray, "batch prompt"],
    prompt_mask: Bool[Array | np.ndarray, "batch prompt"],
    keys: Key[Array, "rows"],
    temperature: float,
    *,
    decoder_def: nnx.GraphDef,
    length: int,
    end: int | tuple[int, ...],
    pad: int,
    samples: int = 1,
) -> Responses:
    """Samples responses to each prompt from softmax(logits / temperature), nothing cut off.

    It stops when every response has ended. On a CPU, where a step takes the longer the more rows it
    has, half of them go on alone when all others have ended.

    Args:
      decoder_state: the policy's decoder, adapters included.
      prompts: padded on the left.
      prompt_mask: True on the prompt's tokens.
      keys: one a row, see `draw_keys`: what is drawn in a row depends on no other row.
      temperature: 0 takes the most likely token.
      decoder_def: the static half of the decoder.
      length: the longest response, in tokens.
      end: the token that ends a response, or all of them; it is part of it.
      pad: fills what follows the end.
      samples: responses to each prompt, whose rows follow each other; it is read once for all.
    """
    size, left = len(prompts) * samples, []
    halved = (lambda rows: 0) if layer_loop.looped() or devices.parted() else fewer
    static = {"decoder_def": decoder_def, "end": end, "pad": pad}
    going = begun(
        decoder_state, prompts, prompt_mask, keys, temperature, length=length, samples=samples,
        until=halved(size), **static,
    )  # fmt: skip
    while halved(size) and going.index < length and not (done := np.asarray(going.done)).all():
        while (~done).sum() <= halved(size):
            size = halved(size)
        rows = np.argsort(done, kind="stable")[:size]
        left.append((rows, going.responses))
        going = continued(
            decoder_state, of_rows(going, rows), temperature, prompt=prompts.shape[1],
            until=halved(size), **static,
        )  # fmt: skip
    responses = going.responses
    for rows, before in reversed(left):
        responses = put_back(before, rows, responses)
    return responses


def fewer(rows: int) -> int:
    """With how many of the rows decoding goes on once no more are left; 0: all to the end."""
    return rows // 2 if rows >= 2 * FEWEST else 0


STATIC = ("temperature", "decoder_def", "end", "pad", "until")


@functools.partial(jax.jit, static_argnames=(*STATIC, "length", "samples"))
def begun(
    decoder_state: nnx.State,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    keys: Key[Array, "rows"],
    temperature: float,
    *,
    decoder_def: nnx.GraphDef,
    length: int,
    end: int | tuple[int, ...],
    pad: int,
    samples: int = 1,
    until: int = 0,
) -> Decoding:
    """Reads the prompts and decodes until so many rows are left; 0: to the end, without a cache.

    Args: as for `sample`.
    """
    decoder = rounded(decoder_state, decoder_def)
    batch, prompt = len(prompts) * samples, prompts.shape[1]
    blocks = arranged(decoder.blocks)
    hidden, cache = prefill(decoder, blocks, prompts, prompt_mask, length)
    if samples > 1:
        hidden, prompt_mask = (jnp.repeat(x, samples, axis=0) for x in (hidden, prompt_mask))
        rows = int(isinstance(blocks, Stacked))  # axis of the caches; layers go before it
        cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=rows), cache)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)
    empty = Responses(
        jnp.full((batch, length), pad, prompts.dtype),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
    )
    going = Decoding(
        jnp.zeros((), jnp.int32), hidden.T, cache, jnp.zeros(batch, bool),
        prompt_mask.sum(axis=1), blocked(prompt_mask, prompt + length), draws, empty,
    )  # fmt: skip
    loop = {"prompt": prompt, "end": end, "pad": pad, "until": until}
    going = decoded(decoder, blocks, going, temperature, **loop)
    return going if until else going._replace(cache=None)


@functools.partial(jax.jit, static_argnames=(*STATIC, "prompt"), donate_argnames="going")
def continued(
    decoder_state: nnx.State, going: Decoding, temperature: float, *,
    decoder_def: nnx.GraphDef, prompt: int, end: int | tuple[int, ...], pad: int, until: int,
) -> Decoding:  # fmt: skip
    """Decodes on, after prompts of so many tokens with their padding."""
    decoder = rounded(decoder_state, decoder_def)
    loop = {"prompt": prompt, "end": end, "pad": pad, "until": until}
    return decoded(decoder, arranged(decoder.blocks), going, temperature, **loop)


def of_rows(going: Decoding, rows: Int[np.ndarray, "some"]) -> Decoding:
    """Some of the rows; memory holds the cache of all and that of some for one block at a time."""

    def taken_from(x):
        some = x[rows]
        x.delete()
        return some

    cache = jax.tree.map(taken_from, going.cache)
    columns = going._replace(hidden=going.hidden.T, cache=None)
    some = jax.tree.map(lambda x: x[rows] if x.ndim else x, columns)
    return some._replace(hidden=some.hidden.T, cache=cache)


@jax.jit
def put_back(
    before: Responses, rows: Int[Array | np.ndarray, "some"], responses: Responses
) -> Responses:
    """The responses of all rows, of which some went on."""
    return jax.tree.map(lambda all_, some: all_.at[rows].set(some), before, responses)


def rounded(state: nnx.State, definition: nnx.GraphDef) -> nnx.Module:
    """The decoder with its weights as they are multiplied: rounded once, not for every token."""
    products = nnx.merge(definition, state).cfg.products
    if products != "float32":
        state = jax.lax.optimization_barrier(for_products(state, products))
    return nnx.merge(definition, state)


def decoded(
    decoder: nnx.Module, blocks: layer_loop.Layers, going: Decoding, temperature: float, *,
    prompt: int, end: int | tuple[int, ...], pad: int, until: int,
) -> Decoding:  # fmt: skip
    """Goes on to the last token, or, before the rest is short, until so many rows are left."""
    length = going.draws.shape[1]
    slots = blocked(jnp.arange(prompt + length)[None], prompt + length)

    def running(going):
        left, short = (~going.done).sum(), length - going.index < SHORT
        return (going.index < length) & (left > 0) & ((left > until) | short)

    def emit(going):
        index, done, responses = going.index, going.done, going.responses
        logits = decoder.logit_columns(going.hidden)
        token, logprob = pick(going.draws[:, index], logits, temperature)
        column = Responses(jnp.where(done, pad, token), ~done, jnp.where(done, 0.0, logprob))
        responses = jax.tree.map(
            lambda all_, one: all_.at[:, index].set(one.astype(all_.dtype)), responses, column
        )
        visible = going.readable | ((slots >= prompt) & (slots <= prompt + index))
        rope = decoder.rope((going.lengths + index)[:, None], prompt + length)
        hidden, cache = decoder.step(token, rope, visible, going.cache, prompt + index, blocks)
        return going._replace(
            index=index + 1, hidden=hidden, cache=cache, done=done | ends_response(token, end),
            responses=responses,
        )  # fmt: skip

    return jax.lax.while_loop(running, emit, going)


def ends_response(tokens: Int[Array, "*axes"], end: int | tuple[int, ...]) -> Bool[Array, "*axes"]:
    """Where one of the tokens that end a response stands."""
    return jnp.isin(tokens, jnp.asarray(end))


def draw_keys(
    key: Key[Array, ""], numbers: Sequence[int] | Int[np.ndarray, "batch"]
) -> Key[Array, "batch"]:
    """A key for each row of a batch: that of the stream, folded with the row's own number.

    Args:
      key: of the stream and the step.
      numbers: of each row's prompt and sample, whatever batch they stand in; below 2^64.
    """
    high, low = np.divmod(np.asarray(numbers, np.uint64), 2**32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, low.astype(np.uint32))
    if not high.any():
        return keys
    folded = jax.vmap(jax.random.fold_in)(keys, high.astype(np.uint32))
    return jnp.where(high > 0, folded, keys)


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
    return in_parts(some, (prompts, prompt_mask), whole_part(len(prompts), PREFILL))


def in_parts(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """A function of rows, applied to `size` of them at a time; the results row by row."""
    parts = divided(rows, size)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    count = len(jax.tree.leaves(parts)[0])

    def part(number, results):
        found = function(jax.tree.map(lambda x: x[number], parts))
        return jax.tree.map(lambda all_, some: all_.at[:, number].set(some), results, found)

    empty = jax.tree.map(lambda x: jnp.zeros((size, count, *x.shape[1:]), x.dtype), shapes)
    results = jax.lax.fori_loop(0, count, part, empty)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def whole_part(rows: int, at_most: int) -> int:
    """The most rows of which whole parts can be made, the same on every device."""
    each = math.gcd(rows, devices.rows_parted())
    return max(size for size in range(each, max(each, at_most) + 1, each) if rows % size == 0)


def divided(rows: Any, size: int) -> Any:
    """Every array in parts of `size` rows, [part size ...], for loops over the parts.

    A part takes every n-th row, so that of rows that lie on several devices every device works on
    its own ones of every part. A part of neighbours would lie on one device, and a loop over such
    parts is one that every device goes through for all of them.
    """
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), rows)


def pick(
    draws: Float[Array, "batch"], logits: Float[Array, "vocab batch"], temperature: float
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """One exact draw per column from softmax(logits / temperature), and its log-probability, nats.

    Inverts the distribution function in two levels, a block of words first, then the word in its
    block: one uniform number below 1 is used a column, not one a word. At temperature 0 it is the
    most likely word, with its log-probability at temperature 1.
    """
    vocab, batch = logits.shape
    logits = logits / (temperature if temperature > 0 else 1.0)
    top = logits.max(axis=0, keepdims=True)
    padding = ((0, -vocab % WORDS), (0, 0))
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(-1, WORDS, batch)
    sums = jnp.cumsum(jnp.exp(blocks - top[None]).sum(axis=1), axis=0)
    if temperature > 0:
        # 1 - u lies in (0, 1], so that a block or word of weight zero is never drawn
        target = (1 - draws[None]) * sums[-1:]
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
