"""Two replies in columns beside each other, and the column that tells which one is better."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError
from rlhf_jax.data import tables
from rlhf_jax.data.dialogues import messages
from rlhf_jax.data.formats import encodable

# The question of a row, its replies by where they stand, and the pairs (better, worse) of these.
Compared = tuple[Any, dict[str, Any], list[tuple[str, str]]]
REPLIES = (
    "response", "answer", "completion", "conversation", "output", "reply", "summary", "generation",
    "candidate",
)  # fmt: skip
PAIRS = [
    (f"{reply}{mark}{first}", f"{reply}{mark}{second}")
    for reply in REPLIES for mark in ("_", "") for first, second in ("01", "12", "ab", "AB")
]  # fmt: skip
CHOICES = (
    "better_response_id", "better_response", "better", "winner", "preference", "preferred",
    "preferred_response", "human_preference", "choice", "chosen", "label", "labels",
)  # fmt: skip
# From -3, the first is much better, to 3, the second is (HelpSteer2 and 3; Wang et al., 2024).
STRENGTHS = ("preference_strength", "overall_preference")
WINNERS = ("winner_model", "winner")  # columns of zeros and ones, one for each reply
TIES = ("both", "neither", "equal", "draw", "same", "none", "nan", "")  # beside tie, tie (bothbad)
MARKS = ("0", "1", "2", "a", "b", "A", "B")  # of the two replies, behind the name of a column
COLUMNS = [
    *(name for pair in PAIRS for name in pair), *CHOICES, *STRENGTHS,
    *(f"{name}_{mark}" for name in ("score", "model", *WINNERS) for mark in MARKS),
]  # fmt: skip


def reply_pair(frame: pd.DataFrame) -> tuple[str, str] | None:
    """The two columns of replies, one of which is chosen in another column, if there are such.

    Replies that stand in `chosen` and `rejected` themselves go before them.
    """
    pair = next((pair for pair in PAIRS if {*pair} <= {*frame.columns}), None)
    if pair and {"chosen", "rejected"} <= {*frame.columns}:
        return pair if told(frame, "chosen", pair).notna().all() else None
    return pair


def chosen_of_two(
    where: str, frame: pd.DataFrame, pair: tuple[str, str], prompt: str | None, notes: Counter
) -> list[Compared]:
    """The rows of a frame with a pair of replies; of ties none is better.

    Which one is chosen is told by a column of CHOICES (a reply's number, letter or model), one of
    STRENGTHS, a column of zeros and ones for each winner, or, as in WebGPT, two scores that add up
    to zero.

    Args:
      where: the frame is from.
      frame: its rows.
      pair: the columns of the replies.
      prompt: the column of the question, if there is one.
      notes: counts the ties.

    Raises:
      UserError: no column tells which reply is better, or a value of it cannot be read.
    """
    better = verdicts(where, frame, pair)
    notes["ties and rows without a choice left out"] += int((better < 0).sum())
    orders = {-1: [], 0: [pair], 1: [pair[::-1]]}
    found = []
    for row, verdict in zip(frame.to_dict("records"), better, strict=True):
        asked, *replies = dialogues(row.get(prompt), *(row[name] for name in pair))
        found.append((asked, dict(zip(pair, replies, strict=True)), orders[verdict]))
    return found


def verdicts(where: str, frame: pd.DataFrame, pair: tuple[str, str]) -> pd.Series:
    """0 where the first reply is better, 1 where the second is, -1 where neither."""
    marks = pair[0][-1], pair[1][-1]
    for winners in ([f"{name}_{mark}" for mark in marks] for name in WINNERS):
        if {*winners} <= {*frame.columns}:
            rule = (lambda column: tables.numbers(column).isin([0, 1]), "1 for the winner, else 0")
            tables.check(where, frame, dict.fromkeys(winners, rule))
            return signs(tables.numbers(frame[winners[1]]) - tables.numbers(frame[winners[0]]))
    if name := next((name for name in CHOICES if name in frame), None):
        better = told(frame, name, pair)
        rule = (lambda column: better.notna(), f"{marks[0]!r}, {marks[1]!r} or 'tie', as in {pair}")
        tables.check(where, frame, {name: rule})
        scores = [f"score_{mark}" for mark in marks]
        if {*scores} <= {*frame.columns}:
            lead = tables.numbers(frame[scores[0]]) - tables.numbers(frame[scores[1]])
            tables.check_scores(where, lead * better.map({0: 1, 1: -1, -1: 0}), f"'{name}'")
        return better.astype(int)
    if name := next((name for name in STRENGTHS if name in frame), None):
        rule = (lambda column: np.isfinite(tables.numbers(column)) | column.isna(), "a number")
        tables.check(where, frame, {name: rule})
        lead = tables.numbers(frame[name])
        if (lead != 0).sum() >= tables.FEWEST_DECIDED and not (
            (lead < 0).any() and (lead > 0).any()
        ):
            raise UserError(
                f"{where}: '{name}' runs from {lead.min():g} to {lead.max():g}; it must be below 0 "
                "where the first reply is better and above 0 where the second is"
            )
        return signs(lead)
    scores = [f"score_{mark}" for mark in marks]
    if {*scores} <= {*frame.columns}:
        first, second = (tables.numbers(frame[name]) for name in scores)
        if np.allclose(first + second, 0):
            return signs(second - first)
    raise UserError(
        f"{where}: no column tells which of {pair[0]} and {pair[1]} is better; it has "
        f"{tables.brief_list(frame.columns)}. Add 'winner' with {marks[0]!r}, {marks[1]!r} or "
        f"'tie' ({', '.join(name for name in CHOICES if name != 'winner')} are read like it), "
        f"'winner_model_{marks[0]}' and 'winner_model_{marks[1]}' with 0 and 1, or 'chosen' and "
        "'rejected' with the replies themselves"
    )


def told(frame: pd.DataFrame, name: str, pair: tuple[str, str]) -> pd.Series:
    """The verdicts of a column that names replies; None where a value names none."""
    unknown = pd.Series(index=frame.index, dtype=object)
    models = [frame.get(f"model_{column[-1]}", unknown) for column in pair]
    values = zip(frame[name], *models, strict=True)
    return pd.Series([verdict(*row, pair) for row in values], frame.index, object)


def signs(lead: pd.Series) -> pd.Series:
    """The verdicts by how far the second reply leads."""
    return (lead > 0).astype(int) - (~(lead > 0) & ~(lead < 0)).astype(int)


def verdict(value: Any, model: Any, other: Any, pair: tuple[str, str]) -> int | None:
    """0 or 1 for the reply that a value names, -1 for a tie; None where it names none.

    A number is the one in the columns' names: 0 and 1 tell nothing of `response_a`.
    """
    if math.isfinite(number := tables.number(value)) and not isinstance(value, bool | np.bool_):
        value = f"{number:g}"
    text = "" if value is None else str(value).strip()
    if text.lower() in TIES or text.lower().startswith(("tie", "both")):
        return -1
    for i, (column, name) in enumerate(zip(pair, (model, other), strict=True)):
        mark, reply = column[-1].lower(), column[:-1].rstrip("_").lower()
        named = [mark, column.lower(), *(f"{what}_{mark}" for what in ("model", "assistant"))]
        if text.lower().replace(" ", "_").replace("-", "_") in (*named, f"{reply}_{mark}"):
            return i
        if isinstance(name, str) and text == name and model != other:
            return i
    return None


def dialogues(prompt: Any, *replies: Any) -> Sequence[Any]:
    """A question and its replies; where they are printed lists of the turns of each speaker, as in
    the arena's files for Kaggle, the replies are whole dialogues and the question is in them."""
    try:
        asked, *answered = (encodable(json.loads(x, strict=False)) for x in (prompt, *replies))
    except (TypeError, ValueError, RecursionError):  # any other text or value
        return prompt, *replies
    lists = [asked, *answered]
    if not all(isinstance(turns, list) and len(turns) == len(lists[0]) for turns in lists):
        return prompt, *replies
    if not all(isinstance(turn, str | None) for turns in lists for turn in turns):
        return prompt, *replies
    return None, *(
        messages(
            tuple(
                (role, text or "")
                for pair in zip(asked, turns, strict=True)
                for role, text in zip(("user", "assistant"), pair, strict=True)
            )
        )
        for turns in answered
    )
