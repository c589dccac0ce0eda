"""Which rows are read: a folder or file, a data set on the hub, or none of them (the stand-in)."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from experiment_runs.errors import UserError
from rlhf_jax.data import tables
from rlhf_jax.data.hub import hub_frame, on_hub

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# As the hub's own names have them: train-00000-of-00001.parquet, test/0000.parquet, test_prefs.
SPLIT = re.compile(
    r"(?:^|[^a-z])(?:(train|training)|(validation|valid|val|dev)|(test|testing|eval|evaluation))"
    r"(?:[^a-z]|$)"
)
LICENCES = {"hub": "see the data set's card", "local": "that of the files' owners"}
SPLITS = ("train", "validation", "test")


def locate(
    given: str, data_dir: Path | None, folders: Sequence[str], hub: str
) -> tuple[Literal["hub", "local", "stand-in"], str]:
    """Where the rows are: ("local", a path), ("hub", an id) or ("stand-in", "").

    Args:
      given: a folder, a file or an id on the hub ("owner/name", "owner/name:configuration"), which
        goes before everything else; "" for none.
      data_dir: folder with local copies, in the first of `folders` that it has.
      hub: the data set that is taken where nothing is given and the hub answers.

    Raises:
      UserError: what is given is neither a path nor an id.
    """
    if given := os.path.expanduser(given):
        if Path(given).exists():
            return "local", given
        if HUB_ID.fullmatch(given):
            return "hub", given
        raise UserError(f"{given}: no such folder or file, and no id on the hub (owner/name)")
    if data_dir is not None:
        there = [name for name in folders if Path(data_dir, name).is_dir()]
        return "local", str(Path(data_dir, (there or folders)[0]))
    return ("hub", hub) if on_hub(hub) else ("stand-in", "")


def rows(kind: str, location: str, columns: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The frames at a location, each with where it is from, those of the training split first.

    Column `split` says which official split a row belongs to, where the names of the files, or of
    the hub's splits, tell one, or else a column of that name. Where the frames have any of
    `columns`, at least these are there.

    Raises:
      UserError: they cannot be read.
    """
    if kind == "hub":
        whole = hub_frame(location, columns)
        frames = [
            (f"{location}, {name}", frame.drop(columns="split").rename_axis("row"), name)
            for name, frame in whole.groupby("split", sort=False)
        ]
    else:
        folder = Path(location)
        frames = [
            (str(path), frame, str(path.relative_to(folder if folder.is_dir() else folder.parent)))
            for path, frame in tables.tables(folder)
        ]
    named = [(where, frame, official_split(name)) for where, frame, name in frames]
    named.sort(key=lambda part: ("", *SPLITS).index(part[2]))
    told = [
        (where, frame.assign(split=split or own_splits(frame))) for where, frame, split in named
    ]
    if any((frame["split"] != "").any() for _, frame in told):
        return told
    return [(where, frame.drop(columns="split")) for where, frame in told]


def own_splits(frame: pd.DataFrame) -> pd.Series | str:
    """The official splits that a column of the rows tells, or ""."""
    if "split" not in frame:
        return ""
    return (
        frame["split"]
        .map(
            lambda value: official_split(value) if isinstance(value, str) else value,
            na_action="ignore",
        )
        .fillna("")
    )


def official_split(name: str) -> str:
    """The official split that the name of a file or split tells, or "".

    The name of the file goes before that of its folder: eval-tasks/train.json is for training.
    """
    for part in reversed(Path(name.lower()).parts):
        if found := SPLIT.search(part):
            return SPLITS[found.lastindex - 1]
    return ""
