"""Preference pairs: SHP's (Ethayarajh et al., 2022), a local copy, or the stand-in."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError
from rlhf_jax.data import documentation, tables
from rlhf_jax.data.documentation import STANDIN_LICENCE, STANDIN_NAME, standin_note
from rlhf_jax.data.tables import Source, file_names, is_text

SHP = "stanfordnlp/SHP"
SPLITS = ("train", "validation", "test")

PAIR_TEXTS = ["post_id", "domain", "history", "human_ref_A", "human_ref_B"]
PAIR_COLUMNS = [*PAIR_TEXTS, "score_A", "score_B", "labels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Post:
    """A question, its distinct replies and the preferences among them."""

    post_id: str
    domain: str
    prompt: str
    replies: tuple[str, ...]
    scores: tuple[int, ...]  # votes of each reply
    pairs: tuple[tuple[int, int], ...]  # (chosen, rejected), indices of replies
    grades: tuple[str, ...] = ()  # difficulty of each pair, where the data know it
    split: str = ""  # the official one, where the data have one


def load_preferences(data_dir: Path | None) -> tuple[pd.DataFrame, Source]:
    """One row a comparison, in SHP's columns, with `score_ratio`.

    Column `split` is there where the data come with official splits (the hub; files called
    train, validation and test), `grade` in the stand-in.

    Args:
      data_dir: folder with a local copy in shp/; None for the hub or, without it, the stand-in.

    Raises:
      UserError: the data cannot be used.
    """
    note = ""
    if data_dir is not None:
        kind, location = "local", str(Path(data_dir, "shp"))
        frame, name = local_preferences(Path(data_dir, "shp"))
        licence = "the owners' of the files; SHP's texts are by Reddit's users, for research"
    elif tables.on_hub(SHP):
        kind, name, location = "hub", SHP, SHP
        frame = tables.hub_frame(SHP, [*PAIR_COLUMNS, "score_ratio"])
        frame["domain"] = frame["domain"].str.replace(r"_(train|validation|test)$", "", regex=True)
        whole = frame[PAIR_TEXTS].apply(is_text).all(axis=1)
        frame = frame[whole].reset_index(drop=True)
        note = f"{(~whole).sum()} rows with an empty text left out" if not whole.all() else ""
        licence = "texts by Reddit's users, for research; see the data set's card"
    else:
        kind, name, location, licence = "stand-in", STANDIN_NAME, "built here", STANDIN_LICENCE
        frame = documentation.preferences()
        note = standin_note()
    if "score_ratio" not in frame:
        scores = frame[["score_A", "score_B"]].clip(lower=1)
        frame["score_ratio"] = scores.max(axis=1) / scores.min(axis=1)
    return frame, Source(
        kind=kind, name=name, location=location, licence=licence, rows=len(frame),
        fingerprint=tables.content_fingerprint(frame), note=note,
    )  # fmt: skip


def local_preferences(folder: Path) -> tuple[pd.DataFrame, str]:
    """The pairs of all files in a folder and the names of the files."""
    frames = dict(tables.tables(folder, PAIR_COLUMNS))
    for path, frame in frames.items():
        check_pairs(path, frame)
    stems = {path: path.name.partition(".")[0] for path in frames}
    if set(stems.values()) <= set(SPLITS):
        frames = {path: frame.assign(split=stems[path]) for path, frame in frames.items()}
    kept = [*PAIR_COLUMNS, "score_ratio", "split", "grade"]
    pairs = pd.concat([frame[frame.columns.intersection(kept)] for frame in frames.values()])
    if "score_ratio" in pairs and pairs["score_ratio"].isna().any():
        del pairs["score_ratio"]
    pairs = pairs.astype({"post_id": str, "score_A": float, "score_B": float, "labels": int})
    return pairs.reset_index(drop=True), file_names(frames)


def check_pairs(path: Path, frame: pd.DataFrame) -> None:
    """Raises UserError for the first text, score or label that cannot be used."""
    rules = {column: (is_text, "a text that is not empty") for column in PAIR_TEXTS[1:]}
    for column in ("score_A", "score_B"):
        rules[column] = (lambda s: pd.to_numeric(s, errors="coerce") % 1 == 0, "a number of votes")
    rules["post_id"] = (lambda s: s.notna(), "the identifier of the post")
    rules["labels"] = (lambda s: s.isin([0, 1]), "1 where A is preferred and 0 where B is")
    for column, (is_right, expected) in rules.items():
        wrong = frame[column][~is_right(frame[column])]
        if len(wrong):
            raise UserError(
                f"{path}, {frame.index.name} {wrong.index[0]}: '{column}' is {wrong.iloc[0]!r}, "
                f"it must be {expected}; correct or remove the row ({len(wrong)} in all)"
            )


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
    for row in frame[frame["score_ratio"] >= min_score_ratio].itertuples(index=False):
        by_post.setdefault((row.post_id, row.history.strip()), []).append(row)
    assembled = (assembled_post(rows, max_pairs_per_post, seed) for rows in by_post.values())
    return [post for post in assembled if post.pairs]


def assembled_post(rows: list[Any], max_pairs: int | None, seed: int) -> Post:
    scores: dict[str, int] = {}
    compared: dict[tuple[str, str], str] = {}  # (chosen, rejected) -> grade
    for row in rows:
        a, b = row.human_ref_A.strip(), row.human_ref_B.strip()
        scores.setdefault(a, int(row.score_A))
        scores.setdefault(b, int(row.score_B))
        compared[(a, b) if row.labels == 1 else (b, a)] = getattr(row, "grade", "")
    pairs = [(x, y) for x, y in compared if (y, x) not in compared]
    if max_pairs is not None and len(pairs) > max_pairs:
        rng = np.random.default_rng([seed, zlib.crc32(rows[0].post_id.encode())])
        pairs = [pairs[i] for i in sorted(rng.choice(len(pairs), max_pairs, replace=False))]
    replies = list(dict.fromkeys(reply for pair in pairs for reply in pair))
    position = {reply: i for i, reply in enumerate(replies)}
    return Post(
        post_id=rows[0].post_id,
        domain=rows[0].domain,
        prompt=rows[0].history.strip(),
        replies=tuple(replies),
        scores=tuple(scores[reply] for reply in replies),
        pairs=tuple((position[x], position[y]) for x, y in pairs),
        grades=tuple(compared[pair] for pair in pairs) if hasattr(rows[0], "grade") else (),
        split=getattr(rows[0], "split", ""),
    )
