"""Prompts in the chat template as rows of equal length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from experiment_runs.errors import UserError
from rlhf_jax.pretrained.tokenizer import Tokenizer


def prompt_rows(
    texts: Sequence[str], tokenizer: Tokenizer, *, length: int
) -> tuple[Int[np.ndarray, "prompts time"], Bool[np.ndarray, "prompts time"], int]:
    """Prompts in the template, padded on the left, and how many were cut.

    Args:
      texts: the users' texts.
      tokenizer: brings the template.
      length: the longest row; where all prompts are shorter, so are the rows.

    Raises:
      UserError: the template alone does not fit.
    """
    room = length - tokenizer.template_length
    if room < 1:
        raise UserError(
            f"prompt_tokens={length} leaves no room beside the chat template's "
            f"{tokenizer.template_length} tokens; give it more"
        )
    encoded = tokenizer.encode(texts)
    longest = max(map(len, encoded)) + tokenizer.template_length
    length = min(length, -(-longest // 8) * 8)  # whole eights, so that few shapes occur
    tokens = np.full((len(texts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(encoded):
        whole = [*tokenizer.prefix, *text[:room], *tokenizer.suffix]
        tokens[row, length - len(whole) :] = whole
        mask[row, length - len(whole) :] = True
    return tokens, mask, sum(len(text) > room for text in encoded)


def cut_texts(texts: Sequence[str], tokenizer: Tokenizer, *, length: int) -> list[str]:
    """What is read of each text that is cut, and "" of those that are read whole.

    Arguments are those of `prompt_rows`.
    """
    room = length - tokenizer.template_length
    return [
        tokenizer.decode(tokens[:room]) if len(tokens) > room else ""
        for tokens in tokenizer.encode(texts)
    ]
