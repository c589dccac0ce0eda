"""What is asked for: `assignment.toml`, which a teacher edits, and how a run compares with it."""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiment_runs.errors import UserError, brief

PATH = Path(__file__).with_name("assignment.toml")  # leads to the file at the top of the project
NEEDED = {
    "submission": {"profile", "paper", "notebook", "page", "student_id", "even", "odd"},
    "kl": {"band"},
    "ratings": {"prompts", "scores", "rubric"},
    "protocol": {"data", "reward", "ppo", "lora", "evaluation", "gan"},
}

KINDS = {
    "submission": dict.fromkeys(NEEDED["submission"], str),
    "kl": {"band": list},
    "ratings": {"prompts": int, "scores": list, "rubric": dict},
    "protocol": dict.fromkeys(NEEDED["protocol"], dict),
}


def read(path: Path) -> dict[str, Any]:
    """The assignment in a file.

    Raises:
      UserError: it cannot be read, or a table or entry is missing.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    for name, needed in NEEDED.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} is {brief(table)}, not a table; write [{name}]")
        if missing := sorted(needed - set(table)):
            raise UserError(f"{path}: [{name}] has no {', '.join(missing)}; add what is missing")
    for place, kind in KINDS.items():
        for name, value in tables[place].items():
            if not isinstance(value, kind.get(name, object)):
                raise UserError(f"{path}: [{place}] {name} is {brief(value)}; see the file's notes")
    for part, fields in tables["protocol"].items():
        for name, value in fields.items():
            if isinstance(value, dict) and "value" not in value:
                raise UserError(f"{path}: [protocol.{part}] {name} has no value; add it")
    band = tables["kl"]["band"]
    if len(band) != 2 or not all(type(end) in (int, float) for end in band):
        raise UserError(f"{path}: [kl] band is {brief(band)}; write two numbers")
    try:
        re.compile(tables["submission"]["student_id"])
    except re.error as error:
        raise UserError(f"{path}: student_id is no regular expression: {error}") from None
    return tables


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
