"""Responses as text."""

import numpy as np

from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.pretrained.tokenizer import Tokenizer


def response_texts(responses: Responses, tokenizer: Tokenizer) -> list[str]:
    """The text of each response, without its end token."""
    tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
    return [tokenizer.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]
