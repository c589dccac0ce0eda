"""Ratings of responses by people: their file and their tables.

A rating belongs to a text, not to a model: it is stored against a hash of prompt and response, so
that it can never be shown beside another text. The file holds one JSON object a line:

    {"response_hash": "0a1b...", "rater": "Anna", "rater_kind": "person", "coherence": 4,
     "relevance": 5, "helpfulness": 3, "completeness": 3, "hallucination_toxicity": 5,
     "note": "", "time": "2026-05-04 10:30:00"}

To take a rating back, delete its line.
"""

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiment_runs.assignment import ASSIGNMENT, PATH
from experiment_runs.errors import UserError
from experiment_runs.files import append_jsonl, read_jsonl, utf8

RUBRIC = ASSIGNMENT["ratings"]
CRITERIA: dict[str, list[str]] = RUBRIC["rubric"]  # to what the scores mean that are explained
EXPLAINED: list[int] = RUBRIC["scores"]
RATINGS = "ratings.jsonl"  # beside the responses, in the folder of their evaluation

Response = Mapping[str, Any]  # a row of an evaluation: prompt_id, prompt, response, model
Kind = Literal["person", "ai"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating:
    """What one rater gave to one response, 1 (worst) to 5 on each criterion."""

    response_hash: str
    rater: str
    rater_kind: Kind  # an AI system's rating is never shown as a person's
    coherence: int
    relevance: int
    helpfulness: int
    completeness: int
    hallucination_toxicity: int  # 5: none
    note: str = ""
    time: str = ""


SCORED = [field.name for field in dataclasses.fields(Rating) if field.type is int]
if set(CRITERIA) != set(SCORED):
    raise SystemExit(
        f"error: {PATH}: [ratings.rubric] has {', '.join(CRITERIA)}; a rating holds "
        f"{', '.join(SCORED)}: describe these"
    )


def response_hash(prompt: str, response: str) -> str:
    """Identifies a response to a prompt by its text; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([prompt, response]).encode()).hexdigest()[:16]


def load_ratings(path: Path, responses: Sequence[Response] | None = None) -> list[Rating]:
    """The ratings of a file; none where there is no file yet.

    Args:
      path: the file.
      responses: those that may be rated; a rating of any other is refused.

    Raises:
      UserError: a line is broken, incomplete, out of range, of an unknown response, or the second
        one of a rater for a response. It names file and line.
    """
    known = None if responses is None else set(by_hash(responses))
    loaded, lines = [], {}
    for line, row in enumerate(read_jsonl(path), start=1):
        try:
            rating = rating_from(row)
            if known is not None and rating.response_hash not in known:
                raise UserError(
                    f"no response here has the hash {rating.response_hash!r}; the rating was given "
                    "for another text, keep it with the run that holds it"
                )
            earlier = lines.setdefault((rating.rater, rating.response_hash), line)
            if earlier != line:
                raise UserError(
                    f"{rating.rater} has rated this response in line {earlier}; keep one of the two"
                )
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        loaded.append(rating)
    return loaded


def rating_from(row: Mapping[str, Any]) -> Rating:
    """A rating from a line of the file."""
    fields = dataclasses.fields(Rating)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    if missing := [name for name in required if row.get(name) is None]:
        raise UserError(f"{', '.join(missing)} is missing; a rating has {', '.join(required)}")
    if unknown := set(row) - {f.name for f in fields}:
        raise UserError(f"{', '.join(sorted(unknown))} is unknown; remove or rename it")
    for name in ("response_hash", "rater", "note", "time"):
        if not isinstance(row.get(name, ""), str):
            raise UserError(f"{name} is {row[name]!r}; write a text")
    if not row["rater"].strip():
        raise UserError("rater is missing; say who rated")
    if row["rater_kind"] not in ("person", "ai"):
        raise UserError(f"rater_kind is {row['rater_kind']!r}; write 'person' or 'ai'")
    for criterion in CRITERIA:
        if type(row[criterion]) is not int or not 1 <= row[criterion] <= 5:
            raise UserError(f"{criterion} is {row[criterion]!r}; a score is an integer from 1 to 5")
    return Rating(**row)


def save_rating(
    path: Path, key: str, rater: str, kind: Kind, scores: Mapping[str, int], note: str = ""
) -> None:
    """Appends one rating to the file."""
    note = " ".join(note.split())  # one line, whatever was typed
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    rating = Rating(response_hash=key, rater=rater, rater_kind=kind, **scores, note=note, time=now)
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("a") as file:  # an editor has left the last line open
            file.write("\n")
    append_jsonl(path, dataclasses.asdict(rating))


def by_hash(responses: Sequence[Response]) -> dict[str, Response]:
    """The different texts among some responses."""
    return {response_hash(row["prompt"], row["response"]): row for row in responses}


def pending(responses: Sequence[Response], path: Path, rater: str) -> dict[str, Response]:
    """What a rater has still to rate, by hash, in this rater's own random order.

    Raises:
      UserError: the rater has no name, or the file is broken.
    """
    if not rater.strip():
        raise UserError("rater is missing; say who rates")
    texts = by_hash(responses)
    done = {r.response_hash for r in load_ratings(path, responses) if r.rater == rater}
    order = np.random.default_rng(list(utf8(rater, "rater").encode())).permutation(len(texts))
    shuffled = [sorted(texts)[i] for i in order]
    return {key: texts[key] for key in shuffled if key not in done}


def label(criterion: str) -> str:
    return criterion.replace("_", " / ")


def rubric() -> pd.DataFrame:
    """What scores mean, in the words that a rater reads; 2 and 4 lie between."""
    rows = [(label(criterion), *meanings) for criterion, meanings in CRITERIA.items()]
    return pd.DataFrame(rows, columns=["criterion", *map(str, EXPLAINED)])


def rating_table(responses: Sequence[Response], ratings: Sequence[Rating]) -> pd.DataFrame:
    """A row for each model: its name, the mean rating of its responses on each criterion, and the
    mean of those; not-a-number where nobody has rated."""
    given = collections.defaultdict(list)
    for rating in ratings:
        given[rating.response_hash].append(rating)
    by_model = collections.defaultdict(list)
    for row in responses:
        by_model[row["model"]] += given[response_hash(row["prompt"], row["response"])]
    rows = []
    for model, own in by_model.items():
        means = {label(c): mean(getattr(rating, c) for rating in own) for c in CRITERIA}
        rows.append({"model": model, **means, "mean": mean(means.values())})
    return pd.DataFrame(rows)


def mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else np.nan


def rating_state(responses: Sequence[Response], ratings: Sequence[Rating]) -> str:
    """How much of what is shown has been rated, and by whom."""
    hashes = set(by_hash(responses))
    known = [rating for rating in ratings if rating.response_hash in hashes]
    done = len({rating.response_hash for rating in known})
    if not done:
        return f"None of the {len(hashes)} responses below has been rated."
    raters = sorted({(rating.rater, rating.rater_kind) for rating in known})
    names = ", ".join(
        f"{name} ({'an AI system' if kind == 'ai' else 'a person'})" for name, kind in raters
    )
    state = f"{done} of the {len(hashes)} responses below have been rated, by {names}."
    kinds = {kind for _, kind in raters}
    if kinds == {"ai"}:
        state += " These are an AI system's ratings, not a person's."
    elif "ai" in kinds:
        state += " The means take ratings by people and by AI systems together."
    return state
