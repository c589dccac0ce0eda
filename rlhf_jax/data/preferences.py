"""Preference pairs: SHP's (Ethayarajh et al., 2022), those of other data sets, or the stand-in."""

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.data import choices, documentation, replies, tables
from rlhf_jax.data.dialogues import (
    BESIDE,
    DIALOGUES,
    POST,
    SYSTEMS,
    Turn,
    identifying,
    question_column,
)
from rlhf_jax.data.documentation import STANDIN_LICENCE, STANDIN_NAME, standin_note
from rlhf_jax.data.locations import LICENCES, locate, rows
from rlhf_jax.data.replies import QUESTION_AND_REPLIES
from rlhf_jax.data.tables import Source, digest, file_names, is_text, is_text_or_empty, is_there

SHP = "stanfordnlp/SHP"
FOLDERS = ("shp", "preferences")  # of a local copy

PAIR_TEXTS = ["post_id", "domain", "history", "human_ref_A", "human_ref_B"]
PAIR_COLUMNS = [*PAIR_TEXTS, "score_A", "score_B", "labels"]
KEPT = [*PAIR_COLUMNS, "score_ratio", "split"]
PROMPT_COLUMNS = (
    "prompt", "question", "instruction", "conversations", "input", "query", "context",
    "history", "user_input", "inputs", "trajectory",
)  # fmt: skip
KNOWN_COLUMNS = [
    *KEPT, *PROMPT_COLUMNS, POST, *BESIDE, *SYSTEMS, *DIALOGUES, *choices.COLUMNS, *replies.COLUMNS,
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Post:
    """A question, its distinct replies and the preferences among them."""

    post_id: str
    domain: str
    prompt: str
    replies: tuple[str, ...]
    scores: tuple[int | float, ...]  # votes of each reply, where the data have them
    pairs: tuple[tuple[int, int], ...]  # (chosen, rejected), indices of replies
    grades: tuple[str, ...] = ()  # difficulty of each pair, where the data know it
    split: str = ""  # the official one, where the data have one
    turns: tuple[Turn, ...] = ()  # of a dialogue, for the chat template; none of a single question


def renumbered(
    pairs: Iterable[tuple[int, int]],
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """The replies that pairs use, in their order, and the pairs as indices of these."""
    pairs = list(pairs)
    used = sorted({reply for pair in pairs for reply in pair})
    number = {reply: i for i, reply in enumerate(used)}
    return used, tuple((number[a], number[b]) for a, b in pairs)


def load_preferences(data_dir: Path | None, given: str = "") -> tuple[pd.DataFrame, Source]:
    """One row a comparison in SHP's columns, with `score_ratio` where replies have votes.

    Column `split` is there where the data come with official splits (those of the hub; files or
    folders called train, validation and test), `grade` in the stand-in.

    Args:
      data_dir: folder with a local copy in shp/ or preferences/; None for the hub or, without it,
        the stand-in.
      given: a folder, a file or an id on the hub, which goes before `data_dir`.

    Raises:
      UserError: the data cannot be used.
    """
    kind, location = locate(given, data_dir, FOLDERS, SHP)
    if kind == "stand-in":
        frame, notes = documentation.preferences(), Counter()
        name, licence = STANDIN_NAME, STANDIN_LICENCE
    else:
        parts = rows(kind, location, KNOWN_COLUMNS)
        name = location if kind == "hub" else file_names(Path(where) for where, _ in parts)
        frame, notes = comparisons(parts)
        licence = "texts by Reddit's users, for research" if location == SHP else LICENCES[kind]
    if "score_A" in frame and "score_ratio" not in frame:
        scores = frame[["score_A", "score_B"]].clip(lower=1)
        frame["score_ratio"] = scores.max(axis=1) / scores.min(axis=1)
    note = standin_note() if kind == "stand-in" else said(notes)
    return frame, Source(
        kind=kind, name=name, licence=licence, rows=len(frame),
        fingerprint=tables.content_fingerprint(frame), note=note,
    )  # fmt: skip


def preference_posts(
    pairs: pd.DataFrame | Iterable[Mapping[str, Any]] | str | Path,
    *,
    max_pairs_per_post: int | None = None,
    seed: int = 0,
) -> list[Post]:
    """The posts of preference pairs.

    Args:
      pairs: a frame, an iterable of mappings, a file, a folder or an id on the hub, in any columns
        that are read: prompt, chosen, rejected, each a text or a list of messages; chosen, rejected
        alone, whole dialogues; two replies and a choice, as `choices` reads them; or SHP's.
      max_pairs_per_post: of a post with more, this many are drawn; None keeps all.
      seed: for the draw.

    Raises:
      UserError: the columns are others, or a value cannot be used.
    """
    if isinstance(pairs, str | Path):
        found, _ = load_preferences(None, str(Path(pairs)))
    elif isinstance(pairs, Mapping):
        raise UserError(
            f"pairs is a mapping of {tables.brief_list(pairs)}; give one of its values where they "
            "are splits, pandas.DataFrame(pairs) where they are columns"
        )
    else:
        frame = pairs if isinstance(pairs, pd.DataFrame) else pd.DataFrame(list(pairs))
        frame = frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name="row"))
        found, _ = comparisons([("pairs", frame)])
    return posts(found, max_pairs_per_post=max_pairs_per_post, seed=seed)


def comparisons(parts: Sequence[tuple[str, pd.DataFrame]]) -> tuple[pd.DataFrame, Counter]:
    """The rows of several frames in SHP's columns, and how many were left out, by reason.

    Args:
      parts: (where it is from, frame), the columns of each those that one kind of data set has.

    Raises:
      UserError: the columns tell no comparison, a value cannot be used, or no row is left.
    """
    notes: Counter = Counter()
    frames = []
    for where, frame in parts:
        frame = in_shp_columns(where, frame, notes)
        check_pairs(where, frame)
        whole = frame[[*QUESTION_AND_REPLIES]].apply(is_text).all(axis=1)
        notes["rows without a question or an answer left out"] += int((~whole).sum())
        frames.append(frame[whole])
    pairs = pd.concat(frames, ignore_index=True)
    same = pairs["human_ref_A"].str.strip() == pairs["human_ref_B"].str.strip()
    notes["comparisons of a reply with itself, which say nothing"] += int(same.sum())
    if same.all():
        raise UserError(
            f"{parts[0][0]}: no row has a question and two answers ({said(notes)}) in its columns, "
            f"{tables.brief_list(parts[0][1].columns)}. Without a "
            "'prompt', 'chosen' and 'rejected' are whole dialogues: lists of messages, or texts "
            "with 'Human:' and 'Assistant:' before the turns"
        )
    votes = [name for name in ("score_A", "score_B") if name in pairs]
    if pairs[votes].isna().any(axis=None):  # some files have none
        pairs = pairs.drop(columns=votes)
    if "score_ratio" in pairs and pairs["score_ratio"].isna().any():
        pairs = pairs.drop(columns="score_ratio")
    pairs["domain"] = pairs["domain"].fillna("all")
    pairs["domain"] = pairs["domain"].str.replace(r"_(train|validation|test)$", "", regex=True)
    for name in ("score_A", "score_B", "score_ratio", "labels"):
        if name in pairs:
            pairs[name] = tables.numbers(pairs[name])
    below = int((pairs[votes] < 0).any(axis=1).sum()) if {*votes} <= {*pairs.columns} else 0
    notes["pairs with votes below zero, which count as one in ratios of votes"] += below
    return pairs.astype({"post_id": str, "labels": int}), notes


def in_shp_columns(where: str, frame: pd.DataFrame, notes: Counter) -> pd.DataFrame:
    """The comparisons of a frame, whatever columns they come in."""
    kept = KEPT
    prompt = question_column(frame, PROMPT_COLUMNS)
    if (pairs := replies.in_pairs(where, frame, prompt, notes)) is not None:
        frame, kept = pairs, [*KEPT, "turns"]
    lacking = [name for name in (*QUESTION_AND_REPLIES, "labels") if name not in frame]
    if lacking:
        raise UserError(
            f"{where}: no preferences in its columns, {tables.brief_list(frame.columns)}. They "
            "must be 'chosen' and 'rejected' (whole dialogues, or replies beside a 'prompt'), two "
            "replies such as 'response_a' and 'response_b' beside a 'prompt' and a 'winner', a "
            "list 'responses' beside a 'prompt' and a list 'scores' or 'ranks', or "
            "'history', 'human_ref_A', 'human_ref_B' and 'labels' as SHP has them"
        )
    if "post_id" not in frame:
        frame = frame.assign(post_id=frame["history"].map(digest))
    if "domain" not in frame:
        frame = frame.assign(domain="all")
    return frame[[name for name in kept if name in frame]]


def said(notes: Counter) -> str:
    return "; ".join(f"{count} {what}" for what, count in notes.items() if count)


def check_pairs(where: str, frame: pd.DataFrame) -> None:
    """Raises UserError for the first text, score or label that cannot be used, and for labels that
    say the opposite of the votes."""
    text = (is_text_or_empty, "a text")
    votes = (
        lambda column: (
            np.isfinite(tables.numbers(column))
            & ~column.map(lambda value: isinstance(value, bool | np.bool_)).astype(bool)
        ),
        "a number of votes",
    )
    rules = dict.fromkeys((*PAIR_TEXTS[1:], "split"), text)
    rules |= {"score_A": votes, "score_B": votes, "score_ratio": (is_ratio, "a number")}
    rules["post_id"] = (tables.is_identifier, "the identifier of the post")
    rules["labels"] = (
        lambda column: tables.numbers(column).isin([0, 1]),
        "1 where A is preferred and 0 where B is",
    )
    tables.check(where, frame, rules)
    if {"score_A", "score_B", "labels"} <= {*frame.columns}:
        lead = tables.numbers(frame["score_A"]) - tables.numbers(frame["score_B"])
        first = tables.numbers(frame["labels"]) == 1
        tables.check_scores(where, lead.where(first, -lead), "'labels' (1 where A is preferred)")


def is_ratio(column: pd.Series) -> pd.Series:
    return np.isfinite(tables.numbers(column)) | column.isna()


def posts(
    frame: pd.DataFrame, *, max_pairs_per_post: int | None, min_score_ratio: float = 1.0, seed: int
) -> list[Post]:
    """The comparisons of a frame by post, in order of first appearance.

    The chosen reply is A where `labels` is 1. Replies of the same text are one reply; comparisons
    of a reply with itself, or made in both directions, say nothing and are left out.

    Args:
      frame: from `load_preferences`.
      max_pairs_per_post: of a post with more, this many are drawn; None keeps all.
      min_score_ratio: least ratio of the two replies' votes (SteamSHP: 2).
      seed: for the draw, which does not depend on the other posts.
    """
    by_post: dict[tuple[str, str], list] = {}
    if min_score_ratio > 1:
        if "score_ratio" not in frame:
            raise UserError(f"min_score_ratio={min_score_ratio}: the replies have no votes; give 1")
        frame = frame[frame["score_ratio"] >= min_score_ratio]
    for row in frame.itertuples(index=False):
        by_post.setdefault((row.post_id, row.history.strip()), []).append(row)
    assembled = (assembled_post(rows, max_pairs_per_post, seed) for rows in by_post.values())
    return [post for post in assembled if post.pairs]


def votes(score: int | float) -> int | float:
    """A whole number of votes as one."""
    return int(score) if score == int(score) else float(score)


def assembled_post(rows: list[Any], max_pairs: int | None, seed: int) -> Post:
    scores: dict[str, int] = {}
    compared: dict[tuple[str, str], str] = {}  # (chosen, rejected) -> grade
    for row in rows:
        a, b = row.human_ref_A.strip(), row.human_ref_B.strip()
        if hasattr(row, "score_A"):
            scores.setdefault(a, votes(row.score_A))
            scores.setdefault(b, votes(row.score_B))
        compared[(a, b) if row.labels == 1 else (b, a)] = getattr(row, "grade", "")
    pairs = [(x, y) for x, y in compared if (y, x) not in compared]
    if max_pairs is not None and len(pairs) > max_pairs:
        rng = np.random.default_rng([seed, zlib.crc32(rows[0].post_id.encode())])
        pairs = [pairs[i] for i in sorted(rng.choice(len(pairs), max_pairs, replace=False))]
    replies = list(dict.fromkeys(reply for pair in pairs for reply in pair))
    position = {reply: i for i, reply in enumerate(replies)}
    dialogue = getattr(rows[0], "turns", "")
    return Post(
        post_id=rows[0].post_id,
        domain=rows[0].domain,
        prompt=rows[0].history.strip(),
        replies=tuple(replies),
        scores=tuple(scores[reply] for reply in replies if reply in scores),
        pairs=tuple((position[x], position[y]) for x, y in pairs),
        grades=tuple(compared[pair] for pair in pairs) if hasattr(rows[0], "grade") else (),
        split=getattr(rows[0], "split", ""),
        turns=tuple(map(tuple, json.loads(dialogue))) if is_there(dialogue) and dialogue else (),
    )


def posts_fingerprint(parts: Mapping[str, Sequence[Post]]) -> str:
    """Tells the posts of some parts from others."""
    return fingerprint({name: [*map(identifying, part)] for name, part in parts.items()})
