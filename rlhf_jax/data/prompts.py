"""Prompts: OASST1's (Koepf et al., 2023), those of other data sets, or the stand-in."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.data import documentation, tables
from rlhf_jax.data.dialogues import (
    BESIDE,
    POST,
    SYSTEMS,
    Turn,
    check_plain,
    conversation_of,
    first_question,
    identifying,
    is_messages,
    question,
    question_column,
    turns,
    with_context,
    with_system,
)
from rlhf_jax.data.documentation import STANDIN_LICENCE, STANDIN_NAME, standin_note
from rlhf_jax.data.locations import LICENCES, locate, rows
from rlhf_jax.data.preferences import Post
from rlhf_jax.data.tables import Source, digest, file_names, is_text, is_there, normalised

OASST = "OpenAssistant/oasst1"
FOLDERS = ("oasst", "prompts")  # of a local copy
MESSAGE_COLUMNS = ["message_id", "message_tree_id", "text", "role", "lang"]
ROLES = ("prompter", "assistant")
MESSAGE_RULES = {
    "message_id": (tables.is_identifier, "the identifier of the message"),
    "message_tree_id": (tables.is_identifier, "the identifier of the conversation"),
}
MESSAGE_RULES |= {
    "text": (tables.is_text_or_empty, "a text"),
    "lang": (is_text, "the code of a language"),
    "role": (lambda column: column.isin(ROLES), "prompter or assistant"),
}
REVIEW_COLUMNS = ["deleted", "review_result"]
MESSAGE_RULES |= dict.fromkeys(REVIEW_COLUMNS, (tables.is_boolean_or_empty, "true or false"))
# Where other data sets have the question, as a text or as a dialogue; the first of these is read.
QUESTION_COLUMNS = [
    "prompt", "question", "instruction", "query", "history", "messages", "conversations",
    "conversation", "input", "text", "user_input", "inputs", "trajectory", "conversation_a",
    "context", "turns", "data", "chosen",
]  # fmt: skip
KNOWN_COLUMNS = [*MESSAGE_COLUMNS, *REVIEW_COLUMNS, *QUESTION_COLUMNS, *SYSTEMS, *BESIDE, POST]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to answer."""

    prompt_id: str
    tree_id: str  # prompts of one conversation share it
    text: str
    origin: Literal["messages", "preferences", "stand-in"]
    turns: tuple[Turn, ...] = ()  # of a dialogue, for the chat template; none of a single question


def load_prompts(data_dir: Path | None, given: str = "") -> tuple[list[Prompt], Source]:
    """Questions to answer, none empty or twice, in the order of the data.

    Of OASST's messages those of prompters in English that were neither deleted nor rejected in
    review. Of other data sets the first question of every dialogue, or all of a dialogue that ends
    with the user. Two texts that differ in case or white space only are the same.

    Args:
      data_dir: folder with a local copy in oasst/ or prompts/; None for the hub or, without it, the
        stand-in, whose prompts are questions that none of its comparisons is about.
      given: a folder, a file or an id on the hub, which goes before `data_dir`.

    Raises:
      UserError: the data cannot be used.
    """
    kind, location = locate(given, data_dir, FOLDERS, OASST)
    if kind == "stand-in":
        name, licence = STANDIN_NAME, STANDIN_LICENCE
        prompts = [
            Prompt(prompt_id=entry.name, tree_id=entry.name, text=text, origin="stand-in")
            for entry, text in documentation.questions()
        ]
        note = standin_note()
    else:
        parts = rows(kind, location, KNOWN_COLUMNS)
        name = location if kind == "hub" else file_names(Path(where) for where, _ in parts)
        licence = "Apache-2.0" if location == OASST else LICENCES[kind]
        prompts, note = questions(parts)
    prompts = distinct(prompts)
    if not prompts:
        raise UserError(f"{location}: no question is left ({note})")
    return prompts, Source(
        kind=kind, name=name, licence=licence, rows=len(prompts),
        fingerprint=prompts_fingerprint(prompts), note=note,
    )  # fmt: skip


def questions(parts: Sequence[tuple[str, pd.DataFrame]]) -> tuple[list[Prompt], str]:
    """The questions of several frames, and a note on which of their texts these are.

    Raises:
      UserError: no column holds questions, or a value is no text and no dialogue.
    """
    of_oasst, others, notes = [], [], []
    for where, frame in parts:
        column = question_column(frame, QUESTION_COLUMNS)
        if {*MESSAGE_COLUMNS} <= {*frame.columns}:
            tables.check(where, frame, MESSAGE_RULES)
            of_oasst.append(frame)
        elif column == "prompt" and "message_tree_id" in frame:
            of_oasst.append(messages := tree_messages(where, frame))
            tables.check(where, messages, MESSAGE_RULES)
        elif column:
            others += column_questions(where, frame, column)
            notes.append(f"column '{column}'")
        else:
            raise UserError(
                f"{where}: no prompts in its columns, {tables.brief_list(frame.columns)}. One of "
                f"them must be {', '.join(QUESTION_COLUMNS[:-1])} (a text or a list of messages), "
                f"or they must be OASST's {', '.join(MESSAGE_COLUMNS)}"
            )
    found: list[Prompt] = []
    if of_oasst:
        found, note = prompter_messages(pd.concat(of_oasst, ignore_index=True))
        notes.append(note)
    return found + others, "; ".join(dict.fromkeys(notes))


def prompter_messages(frame: pd.DataFrame) -> tuple[list[Prompt], str]:
    """The prompts among messages in OASST's columns, and how many were left out.

    A message that one file rejects (the one with the spam) is rejected in all of them.
    """
    wanted = (frame["role"] == "prompter") & (frame["lang"] == "en") & is_text(frame["text"])
    rejected = pd.Series(False, frame.index)
    if "deleted" in frame:
        rejected |= frame["deleted"].map(tables.boolean).isin([True])
    if "review_result" in frame:
        rejected |= frame["review_result"].map(tables.boolean).isin([False])
    rejected = frame["message_id"].isin(frame["message_id"][rejected])
    count = frame["message_id"][wanted & rejected].nunique()
    found = [
        Prompt(
            prompt_id=row.message_id,
            tree_id=row.message_tree_id,
            text=row.text.strip(),
            origin="messages",
        )
        for row in frame[wanted & ~rejected].drop_duplicates("message_id").itertuples(index=False)
    ]
    left_out = f"; {count} deleted or rejected in review left out" if count else ""
    return found, f"every English message by a prompter{left_out}"


def tree_messages(where: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The messages of OASST's trees, each before its replies."""
    found, numbers = [], []
    for number, tree in zip(frame.index, frame.to_dict("records"), strict=True):
        left = [tree["prompt"]]
        while left:
            node = left.pop()
            replies = node.get("replies", []) if isinstance(node, dict) else None
            if not isinstance(replies, list | np.ndarray) or "message_id" not in node:
                raise UserError(f"{where}, {frame.index.name} {number}: not a tree of messages")
            left += reversed(replies)
            values = {name: node.get(name) for name in (*MESSAGE_COLUMNS, *REVIEW_COLUMNS)}
            found.append(values | {"message_tree_id": tree["message_tree_id"]})
            numbers.append(number)
    return pd.DataFrame(found, pd.Index(numbers, name=frame.index.name))


def column_questions(where: str, frame: pd.DataFrame, column: str) -> list[Prompt]:
    """The questions of a column of texts or dialogues, with what belongs to them beside it."""
    check_plain(where, {column: frame[column]})
    found = []
    for number, row in zip(frame.index, frame.to_dict("records"), strict=True):
        if not is_there(row[column]):
            continue
        place = f"{where}, {frame.index.name} {number}"
        dialogue = turns(first_of_texts(row[column]), f"{place}: '{column}'")
        if column == "chosen" and dialogue[-1:] == [("user", str(row[column]).strip())]:
            continue  # an answer whose question is not there
        asked = with_system(with_context(first_question(dialogue), row, column), row, place)
        if text := question(asked):
            key, whole = digest(text), conversation_of(asked)
            found.append(
                Prompt(
                    prompt_id=key,
                    tree_id=key,
                    text=text,
                    origin="messages",
                    turns=() if isinstance(whole, str) else whole,
                )  # fmt: skip
            )
    return found


def first_of_texts(value: Any) -> Any:
    """The first of a list of texts: the user's (MT-bench; Arena-Hard, as {"content"} each), or
    those of both speakers (UltraChat, LIMA). Any other value stays as it is."""
    first = value[0] if is_messages(value) and len(value) else None
    if isinstance(first, dict) and [*first] == ["content"]:
        first = first["content"]
    return first if isinstance(first, str) else value


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of every text."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(normalised(prompt.text), prompt)
    return list(first.values())


def top_up(
    prompts: Sequence[Prompt], prompts_source: Source, posts: Sequence[Post], *, wanted: int
) -> tuple[list[Prompt], Source]:
    """`wanted` prompts, filled up with the posts' questions in their order as far as they suffice.

    The source that is returned says how many were added. No prompt is taken away.
    """
    questions = [
        Prompt(
            prompt_id=post.post_id,
            tree_id=post.post_id,
            text=post.prompt,
            origin="preferences",
            turns=post.turns,
        )  # fmt: skip
        for post in posts
    ]
    enlarged = distinct([*prompts, *questions])[: max(wanted, len(prompts))]
    added = len(enlarged) - len(prompts)
    if not added:
        return enlarged, prompts_source
    note = f"{prompts_source.note}; {added} questions of the preference data added"
    return enlarged, dataclasses.replace(
        prompts_source, rows=len(enlarged), note=note, fingerprint=prompts_fingerprint(enlarged)
    )


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    return fingerprint([identifying(prompt) for prompt in prompts])
