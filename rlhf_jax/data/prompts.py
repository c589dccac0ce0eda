"""Prompts: OASST1's (Koepf et al., 2023), a local copy, or the stand-in."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.data import documentation, tables
from rlhf_jax.data.documentation import STANDIN_LICENCE, STANDIN_NAME, standin_note
from rlhf_jax.data.preferences import Post
from rlhf_jax.data.tables import Source, file_names, is_text, normalised

OASST = "OpenAssistant/oasst1"
MESSAGE_COLUMNS = ["message_id", "parent_id", "message_tree_id", "text", "role", "lang", "deleted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to answer."""

    prompt_id: str
    tree_id: str  # prompts of one conversation share it
    text: str
    origin: Literal["messages", "preferences", "stand-in"]


def load_prompts(data_dir: Path | None) -> tuple[list[Prompt], Source]:
    """English messages by prompters, none empty, deleted or twice, in the order of the data.

    Two texts that differ in case or white space only are the same.

    Args:
      data_dir: folder with a local copy in oasst/; None for the hub or, without it, the stand-in,
        whose prompts are questions that none of its comparisons is about.

    Raises:
      UserError: the data cannot be used.
    """
    note = "every prompter message"
    if data_dir is not None:
        kind, licence, folder = "local", "Apache-2.0 (OASST)", Path(data_dir, "oasst")
        frames = dict(tables.tables(folder, MESSAGE_COLUMNS))
        frame = pd.concat([part[MESSAGE_COLUMNS] for part in frames.values()])
        prompts = messages(frame)
        name, location = file_names(frames), str(folder)
    elif tables.on_hub(OASST):
        kind, name, location, licence = "hub", OASST, OASST, "Apache-2.0"
        prompts = messages(tables.hub_frame(OASST, MESSAGE_COLUMNS))
    else:
        kind, name, location, licence = "stand-in", STANDIN_NAME, "built here", STANDIN_LICENCE
        prompts = [
            Prompt(prompt_id=entry.name, tree_id=entry.name, text=text, origin="stand-in")
            for entry, text in documentation.questions()
        ]
        note = standin_note()
    prompts = distinct(prompts)
    if not prompts:
        raise UserError(
            f"{location}: no English message by a prompter ('lang' en, 'role' prompter)"
        )
    return prompts, Source(
        kind=kind, name=name, location=location, licence=licence, rows=len(prompts),
        fingerprint=prompts_fingerprint(prompts), note=note,
    )  # fmt: skip


def messages(frame: pd.DataFrame) -> list[Prompt]:
    """The prompts among the messages of a frame in OASST's columns."""
    wanted = (frame["role"] == "prompter") & (frame["lang"] == "en") & is_text(frame["text"])
    wanted &= ~frame["deleted"].isin([True])
    return [
        Prompt(
            prompt_id=row.message_id,
            tree_id=row.message_tree_id,
            text=row.text.strip(),
            origin="messages",
        )
        for row in frame[wanted].drop_duplicates("message_id").itertuples(index=False)
    ]


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
        Prompt(prompt_id=post.post_id, tree_id=post.post_id, text=post.prompt, origin="preferences")
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
    return fingerprint([dataclasses.astuple(prompt) for prompt in prompts])
