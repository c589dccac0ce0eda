"""Prompts in the chat template as rows of equal length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from experiment_runs.errors import UserError
from rlhf_jax.data.dialogues import Conversation, Turn, question
from rlhf_jax.pretrained.tokenizer import Tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"  # stands where a cut went through a character


def prompt_rows(
    prompts: Sequence[Conversation], tokenizer: Tokenizer, *, length: int | Sequence[int]
) -> tuple[Int[np.ndarray, "prompts time"], Bool[np.ndarray, "prompts time"], int]:
    """Prompts in the template, padded on the left, and how many were cut.

    Args:
      prompts: texts of users, or dialogues.
      tokenizer: brings the template.
      length: the longest row, or that of each prompt; where all prompts are shorter, so are the
        rows.

    Raises:
      UserError: the template alone does not fit, or it has no place for a dialogue's turns.
    """
    read = read_prompts(prompts, tokenizer, length=length)
    longest = max(len(whole) for whole, _ in read)
    length = min(np.max(length), -(-longest // 8) * 8)  # whole eights, so that few shapes occur
    tokens = np.full((len(prompts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, (whole, _) in enumerate(read):
        tokens[row, length - len(whole) :] = whole
        mask[row, length - len(whole) :] = True
    return tokens, mask, sum(cut is not None for _, cut in read)


def cut_texts(prompts: Sequence[Conversation], tokenizer: Tokenizer, *, length: int) -> list[str]:
    """What is read of each prompt that is cut, and "" of those that are read whole.

    Arguments are those of `prompt_rows`.
    """
    return [cut or "" for _, cut in read_prompts(prompts, tokenizer, length=length)]


def read_prompts(
    prompts: Sequence[Conversation], tokenizer: Tokenizer, *, length: int | Sequence[int]
) -> list[tuple[tuple[int, ...], str | None]]:
    """Tokens of each prompt in the template and, where it is cut, what is read of it."""
    lengths = [length] * len(prompts) if isinstance(length, int) else length
    if prompts and min(lengths) <= tokenizer.template_length:
        raise UserError(
            f"prompt_tokens={min(lengths)} leaves no room beside the chat template's "
            f"{tokenizer.template_length} tokens; give it more"
        )
    texts = iter(tokenizer.encode([prompt for prompt in prompts if isinstance(prompt, str)]))
    dialogues = [
        (prompt, longest)
        for prompt, longest in zip(prompts, lengths, strict=True)
        if not isinstance(prompt, str)
    ]
    turns, longest = zip(*dialogues, strict=True) if dialogues else ((), ())
    fitted = iter(fit_dialogues(turns, tokenizer, lengths=longest))
    read = []
    for prompt, length in zip(prompts, lengths, strict=True):
        if isinstance(prompt, str):
            text, room = next(texts), length - tokenizer.template_length
            whole = (*tokenizer.prefix, *text[:room], *tokenizer.suffix)
            read.append((whole, tokenizer.decode(text[:room]) if len(text) > room else None))
        else:
            read.append(next(fitted))
    return read


def fit_dialogues(
    dialogues: Sequence[Sequence[Turn]], tokenizer: Tokenizer, *, lengths: Sequence[int]
) -> list[tuple[tuple[int, ...], str | None]]:
    """Tokens of each dialogue in the template and, where it is cut to fit, what is read of it.

    The oldest exchanges are left out first, then the end of the last question, then the system
    message.
    """
    kept = [tuple(turns) for turns in dialogues]
    whole = tokenizer.encode_dialogues(kept)
    while long := [i for i, tokens in enumerate(whole) if len(tokens) > lengths[i]]:
        for i in long:
            kept[i] = shortened(kept[i], tokenizer, excess=len(whole[i]) - lengths[i])
        shorter = tokenizer.encode_dialogues([kept[i] for i in long])
        for i, tokens in zip(long, shorter, strict=True):
            whole[i] = tokens
    return [
        (tokens, None if left == tuple(turns) else question(left))
        for tokens, left, turns in zip(whole, kept, dialogues, strict=True)
    ]


def shortened(turns: tuple[Turn, ...], tokenizer: Tokenizer, *, excess: int) -> tuple[Turn, ...]:
    """A dialogue without its oldest exchange; if there is one only, without the end of the question
    or, where nothing of it would be left, without the system message."""
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    system = tuple(turn for turn in turns[: users[0]] if turn[0] == "system")
    if len(users) > 1:
        return (*system, *turns[users[1] :])
    (last,) = tokenizer.encode([turns[-1][1]])
    room = max(len(last) - excess, 0)
    if room == 0 and len(turns) > 1:
        return turns[-1:]
    return (*system, ("user", tokenizer.decode(last[:room]).rstrip(HALF)))
