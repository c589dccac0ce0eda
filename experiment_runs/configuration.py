"""What every configuration checks of its fields, wherever it is made."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from experiment_runs.errors import UserError

SEEDS = 2**31  # of which the generators take one
MOST = 10**8  # of whole numbers; of those below, whose many are in memory at once, so many
MOST_OF = {
    "rank": 2**13, "widths": 2**13, "latents": 2**16, "frames": 10**4, "images": 20_000,
    "batch": 2**16, "forward_batch": 2**13, "batch_pairs": 2**16, "forward_pairs": 2**13,
    "batch_rows": 2**12, "responses_per_prompt": 2**13, "best_of": 2**13, "draws": 10**4,
    "max_tokens": 2**17, "prompt_tokens": 2**17, "response_tokens": 2**17,
    "reference_prompt_tokens": 2**17, "reference_response_tokens": 2**17,
    "reference_samples": 2**16, "dispatch_steps": 10**4, "resamples": 10**6, "neighbours": 10**3,
    "classifier_steps": 10**6, "seed": SEEDS, "seeds": 100,
}  # fmt: skip
TOKENS = 2**22  # in a batch of whatever kind


def made(kind: type, values: Mapping[str, Any], place: str) -> Any:
    """A configuration of the values that stand at a place of a file.

    Raises:
      UserError: it has no such field, or cannot have such a value.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{place}: no field {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def check_types(config: Any) -> None:
    """Rejects a value that is not of its field's type, or beyond all sizes, naming the field.

    Not-a-number is no number. What is too large is refused before any memory is taken for it.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if not fits(getattr(config, field.name), hint):
            options = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
            wanted = f"one of {', '.join(map(str, options))}" if options else described(hint)
            reject(config, field.name, wanted)
        value, most = getattr(config, field.name), MOST_OF.get(field.name, MOST)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, numbers.Integral) and number > most:
                reject(config, field.name, f"at most {most:,}")


def check_tokens(config: Any, rows: str, *lengths: str) -> None:
    """Rejects rows of so many tokens that no memory holds a batch of them."""
    count = getattr(config, rows) * sum(getattr(config, length) for length in lengths)
    if count > TOKENS:
        reject(config, rows, f"less: with {' and '.join(lengths)} a batch has {count:,} tokens, "
               f"more than {TOKENS:,}")  # fmt: skip


def check_seed(config: Any) -> None:
    """Rejects a seed that the generators do not take."""
    if not 0 <= config.seed < SEEDS:
        reject(config, "seed", f"from 0 to {SEEDS - 1}")


def check_positive(config: Any, *fields: str) -> None:
    """Rejects what is not above zero or has no end; None is nothing to check."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not 0 < value < math.inf:
            reject(config, field, "above zero, and finite")


def check_not_negative(config: Any, *fields: str) -> None:
    """Rejects what is below zero or has no end."""
    for field in fields:
        if not 0 <= getattr(config, field) < math.inf:
            reject(config, field, "at least zero, and finite")


def check_fraction(config: Any, *fields: str) -> None:
    """Rejects what is not in [0, 1]."""
    for field in fields:
        if not 0 <= getattr(config, field) <= 1:
            reject(config, field, "from 0 to 1")


def reject(config: Any, field: str, wanted: str) -> None:
    """Raises a UserError that names field, value and what would be right."""
    value = f"{getattr(config, field)!s:.100}"
    raise UserError(f"{type(config).__name__}.{field}={value} is impossible: must be {wanted}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as a field may have it."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in options
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, options[0]) for item in value)
    if hint is float:
        return isinstance(value, numbers.Real) and not math.isnan(value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def described(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
