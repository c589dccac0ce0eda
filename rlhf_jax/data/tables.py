"""Rows in local files, and what every reader checks of them.

Files are validated here: an empty or broken file is one message that names file, line and remedy.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError, brief
from experiment_runs.files import fingerprint
from rlhf_jax.data.formats import SUFFIXES, data_files, encodable, table

FEWEST_DECIDED = 20  # rows whose replies differ in scores, from which on they can contradict
CONTRADICTION = 0.9  # of them with choices against the scores mean that the choices are turned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What was read and from where, as the report's first page states it."""

    kind: Literal["hub", "local", "stand-in"]
    name: str
    licence: str
    rows: int
    fingerprint: str  # of the content, wherever it came from
    note: str = ""


def content_fingerprint(frame: pd.DataFrame) -> str:
    """The same for the same columns and rows in the same order."""
    hashes = pd.util.hash_pandas_object(frame, index=False)
    return fingerprint(list(frame.columns), hashes.to_numpy())


def tables(folder: Path) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The files of a folder and of the folders in it, in order of their names; or one file.

    The index is the line of a file of JSON lines, the row of any other (counted from 1), and is
    named so.

    Raises:
      UserError: no folder, no file, nothing in a file, a file that is broken.
    """
    paths = data_files(folder)
    if not paths:
        raise UserError(
            f"{folder}: no data file; save the rows as one ({', '.join(SUFFIXES)}). A data "
            "directory must hold shp/ with preference pairs and oasst/ with messages; or leave it "
            "unset"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not a regular file, or a link to nothing; remove it")
        frame = table(path)
        if frame.empty:
            raise UserError(f"{path}: the file has no rows; remove it or download it again")
        yield path, frame


def brief_list(names: Iterable[object]) -> str:
    """The first names of a list, for a message."""
    names = [f"{encodable(str(name)):.60}" for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def is_text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: isinstance(value, str) and bool(value.strip())).astype(bool)


def is_text_or_empty(column: pd.Series) -> pd.Series:
    return column.map(lambda value: isinstance(value, str)).astype(bool) | column.isna()


def is_identifier(column: pd.Series) -> pd.Series:
    """What can name a post or a message: a text that is not blank, or a number."""
    plain = column.map(lambda value: isinstance(value, int | float | np.number))
    return plain.astype(bool) & column.notna() | is_text(column)


def is_boolean_or_empty(column: pd.Series) -> pd.Series:
    known = column.map(lambda value: boolean(value) is not None or not str(value).strip())
    return known.astype(bool) | column.isna()


def boolean(value: Any) -> bool | None:
    """What a file says by true, 1.0 or "False"; None for anything else."""
    return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
        str(value).strip().lower()
    )


def numbers(column: pd.Series) -> pd.Series:
    """A column's numbers, also where they are written as text; not-a-number for anything else."""
    return column.map(number).astype(float)


def number(value: Any) -> float:
    if not isinstance(value, str | int | float | np.number | np.bool_ | Decimal):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def check_scores(where: str, lead: pd.Series, chosen: str) -> None:
    """Refuses choices that say the opposite of the scores beside them.

    Args:
      where: the rows are from.
      lead: of the chosen reply over the other one, by score; NaN where there is none.
      chosen: by what, in words.

    Raises:
      UserError: so it is in nearly all of many rows.
    """
    decided = lead[(lead > 0) | (lead < 0)]
    if len(decided) >= FEWEST_DECIDED and (share := (decided < 0).mean()) > CONTRADICTION:
        raise UserError(
            f"{where}: {chosen} prefers the reply with the lower score in {share:.0%} of the rows; "
            "correct one of the two, or remove the scores"
        )


def check(
    where: str, frame: pd.DataFrame, rules: Mapping[str, tuple[Callable[..., pd.Series], str]]
) -> None:
    """Refuses the first value that cannot be used.

    Args:
      where: the frame is from.
      frame: its rows; columns that it lacks are passed over.
      rules: for each column, which of its values are right, and what they are in words.

    Raises:
      UserError: names place, column, value and what would be right.
    """
    for column, (is_right, expected) in rules.items():
        if column not in frame:
            continue
        wrong = frame[column][~is_right(frame[column])]
        if len(wrong):
            value = wrong.iloc[0]
            raise UserError(
                f"{where}, {frame.index.name} {wrong.index[0]}: '{column}' is "
                f"{brief(value.item() if isinstance(value, np.generic) else value)}, it must be "
                f"{expected}; correct or remove the row ({len(wrong)} in all)"
            )


def is_there(value: Any) -> bool:
    """False for what data sets put where a text is missing."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def normalised(text: str) -> str:
    """Equal for texts that differ in case or white space only."""
    return " ".join(text.casefold().split())


def digest(text: Any) -> str:
    """An identifier of a question that comes without one."""
    return hashlib.blake2b(normalised(str(text)).encode(), digest_size=8).hexdigest()


def file_names(paths: Iterable[Path]) -> str:
    names = sorted(path.name for path in paths)
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} files"
