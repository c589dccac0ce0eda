"""What is asked for: `assignment.toml`, which a teacher edits, and how a run compares with it."""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiment_runs.errors import UserError, brief, first_line
from experiment_runs.files import read_whole

PATH = Path(__file__).with_name("assignment.toml")  # leads to the file at the top of the project
FIELDS = {  # that every table must have, and of what type
    "submission": dict.fromkeys(
        ("profile", "paper", "notebook", "page", "student_id", "even", "odd"), str
    ),
    "kl": {"band": list},
    "ratings": {"prompts": int, "scores": list, "rubric": dict},
    "protocol": dict.fromkeys(("data", "reward", "ppo", "lora", "evaluation", "gan"), dict),
    "protocol.data": {"preferences": str, "prompts": str},
    "protocol.reward": dict.fromkeys(
        ("loss", "learning_rate", "batch_pairs", "epochs", "train_pairs"), object
    ),
    "protocol.ppo": dict.fromkeys(
        ("learning_rate", "batch", "forward_batch", "passes", "inner_epochs", "prompts",
         "prompt_tokens", "response_tokens"), object
    ),
    "protocol.lora": dict.fromkeys(("targets", "rank", "alpha", "dropout"), object),
    "protocol.evaluation": {"prompts": object},
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The assignment in a file.

    Raises:
      UserError: it cannot be read, or a table or entry is missing.
    """
    try:
        tables = tomllib.loads(read_whole(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    for place, fields in FIELDS.items():
        table = tables
        for name in place.split("."):
            table = table.get(name, {})
        if not isinstance(table, dict):
            raise UserError(f"{path}: {place} is {brief(table)}, not a table; write [{place}]")
        if missing := sorted(set(fields) - set(table)):
            raise UserError(f"{path}: [{place}] has no {', '.join(missing)}; add what is missing")
        for name, kind in fields.items():
            if not isinstance(table[name], kind) or table[name] == "":
                raise UserError(
                    f"{path}: [{place}] {name} is {brief(table[name])}; see the file's notes"
                )
    if wrong := next(faults(tables), ""):
        raise UserError(f"{path}: {wrong}")
    return tables


def faults(tables: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong inside the values of a file that has all its fields."""
    for part, fields in tables["protocol"].items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if isinstance(value, dict) and "value" not in value:
                yield f"[protocol.{part}] {name} has no value; add it"
            elif isinstance(value, dict) and not all(map(is_number, value.values())):
                yield f"[protocol.{part}] {name} is {brief(value)}; write numbers"
            elif isinstance(value, dict) and not is_range(**value):
                yield (
                    f"[protocol.{part}] {name} is {brief(value)}; write a value with 'from', "
                    "'to' or both, between which it lies"
                )
    band, scores = tables["kl"]["band"], tables["ratings"]["scores"]
    if len(band) != 2 or not all(map(is_number, band)) or not band[0] < band[1]:
        yield f"[kl] band is {brief(band)}; write two numbers, the lower one first"
    if not all(type(score) is int and 1 <= score <= 5 for score in scores):
        yield f"[ratings] scores is {brief(scores)}; write whole numbers from 1 to 5"
    elif scores != sorted({*scores}):
        yield f"[ratings] scores is {brief(scores)}; write each once, the lowest first"
    for criterion, meanings in tables["ratings"]["rubric"].items():
        texts = isinstance(meanings, list) and all(isinstance(x, str) for x in meanings)
        if not texts or len(meanings) != len(scores):
            yield (
                f"[ratings.rubric] {criterion} is {brief(meanings)}; write a text for each of the "
                f"{len(scores)} scores"
            )
    try:
        re.compile(tables["submission"]["student_id"])
    except (re.error, RecursionError, OverflowError) as error:
        yield f"student_id is no regular expression: {first_line(error)}"


def is_range(value: int | float, **ends: int | float) -> bool:
    """Whether an entry of the protocol has one end or both and holds its own value."""
    low, high = ends.get("from", value), ends.get("to", value)
    return bool(ends) and ends.keys() <= {"from", "to"} and low <= value <= high


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value


def needed(make: Callable[[], Any]) -> Any:
    """What is made of the file as it is imported, before any command begins; else the program ends.

    Nothing works without it.
    """
    try:
        return make()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


ASSIGNMENT = needed(lambda: read(PATH))
SUBMISSION = ASSIGNMENT["submission"]
KL_BAND = tuple(ASSIGNMENT["kl"]["band"])  # nats per token
PROTOCOL = ASSIGNMENT["protocol"]


def values(part: str) -> dict[str, Any]:
    """What the profile of the assignment says of a part of the protocol, by field."""
    plain = {name: x["value"] if isinstance(x, dict) else x for name, x in PROTOCOL[part].items()}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}


def wanted(part: str, field: str) -> str:
    """What the protocol allows for a field, in words."""
    asked = PROTOCOL[part][field]
    if isinstance(asked, list):
        return ", ".join(map(str, asked))
    if not isinstance(asked, dict):
        return in_words(asked)
    low, high = (in_words(asked[end]) if end in asked else "" for end in ("from", "to"))
    if low and high:
        return f"{low} to {high}"
    return f"at least {low}" if low else f"at most {high}"


def in_words(value: Any) -> str:
    """A value as it is printed."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def departures(
    part: str, config: Mapping[str, Any], fields: Iterable[str] | None = None
) -> list[str]:
    """What of a configuration the protocol does not allow, of all fields of a part or of some."""
    found = []
    for field in PROTOCOL[part] if fields is None else fields:
        asked, value = PROTOCOL[part][field], config.get(field)
        if isinstance(asked, dict):
            number = value if isinstance(value, int | float) else float("nan")
            low, high = asked.get("from", -float("inf")), asked.get("to", float("inf"))
            kept = low <= number <= high
        else:
            kept = list(value) == asked if isinstance(value, list | tuple) else value == asked
        if not kept:
            found.append(f"{field} is {value}, the protocol says {wanted(part, field)}")
    return found
