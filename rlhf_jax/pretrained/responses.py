"""Responses of a model to prompts, and their text."""

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from experiment_runs.configuration import SEEDS
from experiment_runs.errors import UserError
from rlhf_jax.data.dialogues import Conversation
from rlhf_jax.language_model.sampling import Responses, draw_keys, sample
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.tokenizer import Tokenizer

SAMPLE_BIT = 24  # the number of a draw is that of its prompt, and above this bit of its sample


def respond(
    decoder: tuple[nnx.GraphDef, nnx.State],
    prompts: Int[Array | np.ndarray, "batch prompt"],
    prompt_mask: Bool[Array | np.ndarray, "batch prompt"],
    tokenizer: Tokenizer,
    *,
    length: int,
    temperature: float,
    seed: int,
    first: int = 0,
    samples: int = 1,
) -> Responses:
    """Responses to each prompt, those to one together; all models get the same draws for the same.

    Args:
      decoder: static half and arrays of the model.
      prompts: padded on the left.
      prompt_mask: True on the prompts' tokens.
      tokenizer: of the model.
      length: the longest response, in tokens.
      temperature: 0 takes the most likely token.
      seed: of the draws.
      first: the number of the first prompt among all; what is drawn for a prompt depends on it.
      samples: responses to each prompt; the first one is the same, however many there are.
    """
    check_draws(temperature, seed)
    numbers = np.arange(first, first + len(prompts))[:, None]
    numbers = (numbers | (np.arange(samples)[None] << SAMPLE_BIT)).ravel()
    return sample(
        decoder[1], prompts, prompt_mask, draw_keys(jax.random.key(seed), numbers), temperature,
        decoder_def=decoder[0], length=length, end=tokenizer.ends, pad=tokenizer.pad,
        samples=samples,
    )  # fmt: skip


def check_draws(temperature: float, seed: int) -> None:
    """Raises UserError where nothing can be drawn so."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: must be 0 or a number above it")
    if not 0 <= seed < SEEDS:
        raise UserError(f"seed={seed}: must be from 0 to {SEEDS - 1}")


def answers(
    decoder: tuple[nnx.GraphDef, nnx.State],
    prompts: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int,
    length: int,
    temperature: float,
    seed: int,
    batch: int,
) -> Iterator[tuple[str, bool]]:
    """The text of a response to each prompt, and whether it ended by itself.

    Args:
      decoder: static half and arrays of the model.
      prompts: texts of users, or dialogues.
      tokenizer: of the model.
      prompt_tokens: longest prompt, template included; what is longer is cut.
      length: the longest response, in tokens.
      temperature: 0 takes the most likely token.
      seed: of the draws.
      batch: how many prompts are answered at a time.
    """
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=prompt_tokens)
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        responses = jax.device_get(
            respond(
                decoder, rows[part], masks[part], tokenizer,
                length=length, temperature=temperature, seed=seed, first=start,
            )
        )  # fmt: skip
        texts = response_texts(responses, tokenizer)
        yield from zip(texts, ended(responses, tokenizer).tolist(), strict=True)


def ended(responses: Responses, tokenizer: Tokenizer) -> Bool[np.ndarray, "batch"]:
    """Which responses ended by themselves; the others were cut off."""
    tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
    return (np.isin(tokens, tokenizer.ends) & mask).any(axis=1)


def response_texts(responses: Responses, tokenizer: Tokenizer) -> list[str]:
    """The text of each response, without its end token."""
    tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
    return [tokenizer.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]


def response_rows(
    texts: Sequence[str], tokenizer: Tokenizer, *, length: int
) -> tuple[Responses, int]:
    """Texts as responses that end, padded on the right, and how many were cut to fit.

    Args:
      texts: without end token.
      tokenizer: of the model that reads them.
      length: the longest row; where all texts are shorter, so are the rows.
    """
    encoded = [[*text, *tokenizer.closing] for text in tokenizer.encode(texts, reply=True)]
    longest = -(-max(map(len, encoded)) // 8) * 8  # whole eights, so that few shapes occur
    shape = len(texts), min(length, longest)
    tokens, mask = np.full(shape, tokenizer.pad, np.int32), np.zeros(shape, bool)
    for row, text in enumerate(encoded):
        kept = text[: shape[1]]
        tokens[row, : len(kept)], mask[row, : len(kept)] = kept, True
    cut = sum(len(text) > length for text in encoded)
    return Responses(tokens, mask, np.zeros(shape, np.float32)), cut
