"""Replies to one question, in whichever columns, as pairs of a better and a worse one."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError
from rlhf_jax.data import choices, tables
from rlhf_jax.data.choices import REPLIES, Compared
from rlhf_jax.data.dialogues import (
    BESIDE,
    SYSTEMS,
    Turn,
    check_plain,
    conversation_of,
    is_messages,
    question,
    spoken,
    turns,
    with_context,
    with_system,
)
from rlhf_jax.data.tables import is_there

QUESTION_AND_REPLIES = ("history", "human_ref_A", "human_ref_B")
CHOSEN = [
    ("chosen", "rejected"),
    *((f"chosen_{reply}", f"rejected_{reply}") for reply in REPLIES),
    *((f"{reply}_chosen", f"{reply}_rejected") for reply in REPLIES),
    ("accepted", "rejected"),
    ("response_j", "response_k"),  # of stack-exchange-paired, the better one first
]
LISTS = (
    "answers", "completions", "responses", "replies", "summaries", "generations", "candidates",
    "outputs", "responses_and_scores", "all_generated_responses",
)  # fmt: skip
TEXTS = (*REPLIES, "text", "content")  # of a reply in a list
RANKS = ("rank", "ranks", "ranking", "rankings")  # the lowest is best
SCORES = (  # the highest is best
    "overall_score", "score", "scores", "rating", "ratings", "reward", "rewards", "pm_score",
    "all_rm_scores", "helpfulness", "fine-grained_score",
)  # fmt: skip
GRADES = (*RANKS, *SCORES)
PAIR_SCORES = ("score_{}", "{}_score", "rating_{}", "{}_rating")  # columns, of chosen and rejected
COLUMNS = [*LISTS, *REPLIES, *GRADES, *(name for pair in CHOSEN for name in pair)]
MOST_REPLIES = 100  # to one question
MOST_PAIRS = 10_000_000


def in_pairs(
    where: str, frame: pd.DataFrame, prompt: str | None, notes: Counter
) -> pd.DataFrame | None:
    """A frame's comparisons in SHP's columns, a row for every pair, A the better reply.

    Without a prompt, or with replies that are whole dialogues, the question is all that comes
    before the last answer.

    Args:
      where: the frame is from.
      frame: its rows, in a layout of `compared`.
      prompt: the column of the question, if there is one.
      notes: counts what is left out.

    Returns:
      None where the frame has no such layout.

    Raises:
      UserError: a value cannot be read, or nothing tells which reply is better.
    """
    if (found := compared(where, frame, prompt, notes)) is None:
        return None
    frame, rows = found
    check_plain(where, texts_by_column(prompt, rows))
    kept = [name for name in ("domain", "split") if name in frame]
    numbers, pairs = [], []
    for number, row, (asked, replies, order) in zip(
        frame.index, frame.to_dict("records"), rows, strict=True
    ):
        place = f"{where}, {frame.index.name} {number}"
        for texts in comparisons_of_row(place, row, prompt, asked, replies, order, notes):
            numbers.append(number)
            pairs.append((*texts, *(row[name] for name in kept)))
    index = pd.Index(numbers, name=frame.index.name)
    columns = pd.DataFrame(pairs, index, (*QUESTION_AND_REPLIES, "turns", *kept))
    return (columns if columns["turns"].any() else columns.drop(columns="turns")).assign(labels=1)


def texts_by_column(prompt: str | None, rows: Sequence[Compared]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for asked, replies, _ in rows:
        for name, value in [(prompt, asked)] * bool(prompt) + [*replies.items()]:
            found.setdefault(name.partition("[")[0], []).append(value)
    return found


def comparisons_of_row(
    place: str, row: dict, prompt: str | None, asked: Any, replies: dict[str, Any],
    order: Sequence[tuple[str, str]], notes: Counter,
) -> list[tuple[str, str, str, str]]:  # fmt: skip
    """(question, better reply, worse reply, turns as JSON) of every pair; of texts that are
    missing, or answers to different questions, empty ones."""
    if not order:
        return []
    before: list[Turn] = []
    if prompt and is_there(asked):
        before = with_context(turns(asked, f"{place}: '{prompt}'"), row, prompt)
    answers = {
        name: answer(value, before, f"{place}: '{name}'") if is_there(value) else (before, "")
        for name, value in replies.items()
    }
    questions: dict[tuple[Turn, ...], tuple[str, str]] = {}
    found = []
    for better, worse in order:
        (asked, chosen), (other, rejected) = answers[better], answers[worse]
        found.append(("", "", "", ""))  # left out, unless there is a comparison
        if asked != other:
            notes["pairs of dialogues part before the last answer"] += bool(chosen and rejected)
        elif chosen and rejected and asked and asked[-1][0] == "user":
            if (key := tuple(asked)) not in questions:
                whole = with_system(asked, row, place)
                notes["questions are dialogues of several turns"] += len(spoken(whole)) > 1
                dialogue = conversation_of(whole)
                written = "" if isinstance(dialogue, str) else json.dumps(dialogue)
                questions[key] = question(whole), written
            text, written = questions[key]
            found[-1] = text, chosen, rejected, written
    return found


def answer(value: Any, before: list[Turn], where: str) -> tuple[list[Turn], str]:
    """The turns before the answer, and the answer; it is empty where a dialogue has none."""
    dialogue = turns(value, where)
    if isinstance(value, str) and before and (not dialogue or dialogue[-1][0] != "assistant"):
        return before, value.strip()
    if not dialogue or dialogue[-1][0] != "assistant":
        return before, ""
    return dialogue[:-1] or before, dialogue[-1][1]


def compared(
    where: str, frame: pd.DataFrame, prompt: str | None, notes: Counter
) -> tuple[pd.DataFrame, list[Compared]] | None:
    """The replies of every row and which are better, in the first of these layouts that is there:

    two replies and a column that tells which is better, as `choices` reads them; a chosen reply
    and a rejected one, or a list of each; a list of replies with ranks or scores in it or beside
    it, or of two replies beside a choice; one reply a row with its rank or score, where rows share
    questions. None without any.
    """
    if pair := choices.reply_pair(frame):
        return frame, choices.chosen_of_two(where, frame, pair, prompt, notes)
    if pair := next((names for names in CHOSEN if {*names} <= {*frame.columns}), None):
        return frame, bounded(where, chosen_and_rejected(where, frame, pair, prompt, notes))
    lists = [name for name in LISTS if name in frame and frame[name].map(is_messages).any()]
    if not lists:
        frame, lists = by_question(frame, prompt)
    if not lists:
        return None
    rule = (
        lambda column: column.map(lambda value: not is_there(value) or is_short_list(value)),
        f"a list of at most {MOST_REPLIES} replies",
    )
    tables.check(where, frame, {lists[0]: rule})
    if (grades := grades_of(where, frame, lists[0])) is not None:
        return frame, bounded(where, ranked(frame, lists[0], grades, prompt, notes))
    return of_two(where, frame, lists[0], prompt, notes)


def of_two(
    where: str, frame: pd.DataFrame, name: str, prompt: str | None, notes: Counter
) -> tuple[pd.DataFrame, list[Compared]]:
    """Lists of two replies without grades (summarize_from_feedback), as two columns."""
    if not {*choices.CHOICES, *choices.STRENGTHS} & {*frame.columns}:
        raise UserError(
            f"{where}: nothing tells which replies of '{name}' are better; its columns are "
            f"{tables.brief_list(frame.columns)}. Give every reply a 'rank' (1 the best) or a "
            "'score', add a list 'ranks' or 'scores' beside them, or 'choice' with 0 or 1 where "
            "they are two"
        )
    pair = f"{name}_0", f"{name}_1"
    lists = [
        value if is_messages(value) and len(value) == 2 else (None, None) for value in frame[name]
    ]
    columns = pd.DataFrame([[*map(text_of, two)] for two in lists], frame.index, pair, object)
    whole = frame.join(columns)
    return whole, choices.chosen_of_two(where, whole, pair, prompt, notes)


def bounded(where: str, rows: Iterable[Compared]) -> list[Compared]:
    """The rows, which have no more pairs than memory holds."""
    found, pairs = [], 0
    for row in rows:
        found.append(row)
        pairs += len(row[2])
        if pairs > MOST_PAIRS:
            raise UserError(f"{where}: more than {MOST_PAIRS:,} pairs; keep a part of its rows")
    return found


def is_short_list(value: Any) -> bool:
    return is_messages(value) and len(value) <= MOST_REPLIES


def chosen_and_rejected(
    where: str, frame: pd.DataFrame, pair: tuple[str, str], prompt: str | None, notes: Counter
) -> Iterator[Compared]:
    """Of columns of chosen and rejected replies; where they are lists of texts (RewardBench 2),
    every chosen one is better than every rejected one. What is chosen at the same score is left
    out (UltraFeedback's binarized pairs)."""
    several = (
        lambda column: column.map(
            lambda value: (
                not is_messages(value) or is_short_list(value) or not isinstance(value[0], str)
            )
        ),
        f"a text, messages or at most {MOST_REPLIES} texts",
    )
    tables.check(where, frame, dict.fromkeys(pair, several))
    for names in ([form.format(name) for name in pair] for form in PAIR_SCORES):
        if {*names} <= {*frame.columns}:
            chosen, rejected = (tables.numbers(frame[name]) for name in names)
            tables.check_scores(where, chosen - rejected, f"'{pair[0]}'")
    for row in frame.to_dict("records"):
        chosen, rejected = (numbered(name, row[name]) for name in pair)
        tie = tied(row, pair)
        notes["pairs of replies of the same rank or score left out"] += tie
        order = [] if tie else [*itertools.product(chosen, rejected)]
        yield row.get(prompt), chosen | rejected, order


def tied(row: dict, pair: tuple[str, str]) -> bool:
    """Whether a row says that its two replies are as good as each other."""
    scores = ([tables.number(row.get(form.format(name))) for name in pair] for form in PAIR_SCORES)
    return row.get("status") == "tie" or any(one == other for one, other in scores)


def numbered(name: str, value: Any) -> dict[str, Any]:
    if is_messages(value) and len(value) and all(isinstance(text, str) for text in value):
        return {f"{name}[{i}]": text for i, text in enumerate(value)}
    return {name: value}


def by_question(frame: pd.DataFrame, prompt: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Rows of a question, one reply to it and its grade (HelpSteer2), as a list for each question;
    and the column of the lists, if there is one."""
    name = next((name for name in REPLIES if name in frame and name != prompt), None)
    grade = next(
        (
            name
            for name in GRADES
            if name in frame and np.isfinite(tables.numbers(frame[name])).any()
        ),
        None,
    )
    if not (name and grade and prompt):
        return frame, []
    asked = [
        column for column in dict.fromkeys((prompt, *SYSTEMS, *BESIDE, "split")) if column in frame
    ]
    keys = pd.Series(
        list(zip(*(frame[column].map(str) for column in asked), strict=True)), frame.index
    )
    if not keys.duplicated().any():
        return frame, []
    items = pd.Series(frame[[name, grade]].to_dict("records"), frame.index)
    lists = items.groupby(keys, sort=False).agg(list)
    return frame[~keys.duplicated()].assign(**{name: lists.to_list()}), [name]


def grades_of(where: str, frame: pd.DataFrame, name: str) -> list[list[float]] | None:
    """The grade of every reply of a column of lists, the highest best, not-a-number where one has
    none; None where neither the replies nor a column beside them has ranks or scores."""
    lists = [[*value] if is_messages(value) else [] for value in frame[name]]
    records = [item for items in lists for item in items if isinstance(item, dict)]
    named = {name for item in records for name, value in item.items() if is_there(value)}
    if field := next((field for field in GRADES if field in named), None):
        values = [
            [item.get(field) if isinstance(item, dict) else None for item in items]
            for items in lists
        ]
    elif field := next(
        (field for field in GRADES if field in frame and frame[field].map(is_messages).any()), None
    ):
        values = [
            [*value] if is_messages(value) else [None] * len(items)
            for value, items in zip(frame[field], lists, strict=True)
        ]
        lengths = pd.Series([*map(len, lists)], frame.index)
        rule = (
            lambda column: ~column.map(is_messages) | (column.map(grade_count) == lengths),
            f"a list as long as '{name}'",
        )
        tables.check(where, frame, {field: rule})
    else:
        return None
    sign = -1 if field in RANKS else 1
    return [[sign * tables.number(value) for value in items] for items in values]


def grade_count(value: Any) -> int:
    return len(value) if is_messages(value) else 0


def ranked(
    frame: pd.DataFrame, name: str, grades: Sequence[Sequence[float]], prompt: str | None,
    notes: Counter,
) -> Iterator[Compared]:  # fmt: skip
    """All pairs of replies with different grades of every row."""
    for row, values in zip(frame.to_dict("records"), grades, strict=True):
        texts = {
            f"{name}[{i}]": text_of(item) for i, item in enumerate(row[name] if values else [])
        }
        graded = {
            place: value for (place, text), value in zip(texts.items(), values, strict=True)
            if math.isfinite(value) and is_there(text)
        }  # fmt: skip
        order = [(x, y) for x, y in itertools.permutations(graded, 2) if graded[x] > graded[y]]
        notes["replies without a text, a rank or a score left out"] += len(texts) - len(graded)
        ties = math.comb(len(graded), 2) - len(order)
        notes["pairs of replies of the same rank or score left out"] += ties
        yield row.get(prompt), texts, order


def text_of(item: Any) -> Any:
    """A reply in a list: the item, or the field of it that holds the text; None of a blank one."""
    if isinstance(item, dict):
        item = next((item[field] for field in TEXTS if is_there(item.get(field))), None)
    return None if isinstance(item, str) and not item.strip() else item
