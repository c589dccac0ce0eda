"""Rows in local files, and what every reader checks of them.

Files are validated here: a missing column, an empty or broken file is one message that names file,
line and remedy.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet

from experiment_runs.errors import UserError, brief, first_line
from experiment_runs.files import fingerprint

SMALL_CONTENT = 2**26  # bytes; a file may always unpack to so many
UNPACKING = 30  # a file may unpack to so many times its size
LONGEST_LINE = 2**24  # bytes
LONGEST_HEADER = 2**16  # bytes
MOST_COLUMNS = 1000
MOST_ROWS = 1_000_000
MANY_LINES = 100_000
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What was read and from where, as the report's first page states it."""

    kind: Literal["hub", "local", "stand-in"]
    name: str
    location: str
    licence: str
    rows: int
    fingerprint: str  # of the content, wherever it came from
    note: str = ""


def content_fingerprint(frame: pd.DataFrame) -> str:
    """The same for the same columns and rows in the same order."""
    hashes = pd.util.hash_pandas_object(frame, index=False)
    return fingerprint(list(frame.columns), hashes.to_numpy())


def tables(folder: Path, columns: Sequence[str]) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The files of a folder and of the folders in it, in order of their names; or one file.

    The index is the line of a JSON file, the row of a CSV or Parquet one (counted from 1), and is
    named so.

    Raises:
      UserError: no folder, no file, nothing in a file, a column missing, a file that is broken.
    """
    paths = sorted(path for path in folder.rglob("*") if is_data(path.relative_to(folder)))
    if folder.is_file() and folder.name.endswith(SUFFIXES):
        paths = [folder]
    if not paths:
        raise UserError(
            f"{folder}: no data file ({', '.join(SUFFIXES)}); the data directory must hold "
            "shp/ with preference pairs and oasst/ with messages, or leave it unset"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not a regular file, or a link to nothing; remove it")
        frame = table(path)
        if frame.empty:
            raise UserError(f"{path}: the file has no rows; remove it or download it again")
        missing = [column for column in columns if column not in frame]
        if missing:
            raise UserError(
                f"{path}: no column {', '.join(map(repr, missing))}; it has "
                f"{brief_list(frame.columns)}. Rename or add what is missing"
            )
        yield path, frame


def is_data(path: Path) -> bool:
    """False for what git, macOS and the data sets' own library leave beside the data."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.name.endswith(SUFFIXES) and path.name not in DESCRIPTIONS and not hidden


def table(path: Path) -> pd.DataFrame:
    """A file of JSON lines, CSV or Parquet; its size, names and depth are bounded.

    Raises:
      UserError: it cannot be read, or it is not what its name says.
    """
    try:
        if path.suffix == ".parquet":
            frame = parquet(path)
        elif path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
            return json_lines(path)
        else:
            frame = csv(path)
    except UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); download it again"
        ) from None
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name="row"))


# What gzip, pandas and Arrow raise for files that are damaged or not what their name says.
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, OverflowError, MemoryError, zlib.error,
    NotImplementedError, pyarrow.ArrowException,
)  # fmt: skip


class Unpacked(io.RawIOBase):
    """The bytes of a file, unpacked where it is gzip, up to what a file of its size may hold."""

    def __init__(self, path: Path):
        self.file = (gzip.open if path.suffix == ".gz" else open)(path, "rb")
        self.limit, self.count = largest_content(path), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.count += count
        if self.count > self.limit:
            raise OSError(f"it unpacks to more than {self.limit:,} bytes")
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def largest_content(path: Path) -> int:
    """Bytes that a file of data may unpack to; text is packed into a third to a tenth."""
    return max(SMALL_CONTENT, UNPACKING * path.stat().st_size)


def json_lines(path: Path) -> pd.DataFrame:
    """One JSON object a line; blank lines are passed over."""
    rows, numbers, names = [], [], set()
    raw = Unpacked(path)
    with io.BufferedReader(raw, 2**20) as file:
        for number in range(1, MOST_ROWS + 2):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                break
            if number == MANY_LINES and raw.count < 20 * number:
                raise ValueError(f"{number:,} lines of less than 20 bytes each are no data")
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number} is longer than {LONGEST_LINE:,} bytes")
            if not line.isspace():
                rows.append(json_object(line.decode(), path, number))
                numbers.append(number)
                if not names.issuperset(rows[-1]):
                    names |= rows[-1].keys()
                if len(names) > MOST_COLUMNS:
                    raise ValueError(f"more than {MOST_COLUMNS} fields up to line {number}")
    check_count(number)
    return pd.DataFrame(rows, index=pd.Index(numbers, name="line"))


def json_object(line: str, path: Path, number: int) -> dict:
    try:
        value = encodable(json.loads(line))
        if isinstance(value, dict):
            return value
        wrong = "not a JSON object; the file must hold one object a line"
    except RecursionError:
        wrong = "nested too deeply; repair or delete the line"
    except ValueError as error:  # among them a number of too many digits
        wrong = f"not JSON ({str(error).split(';')[0]}); repair or delete the line"
    raise UserError(f"{path}, line {number}: {wrong}")


def encodable(item: object) -> object:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    if isinstance(item, dict):
        return {encodable(key): encodable(value) for key, value in item.items()}
    if isinstance(item, list):
        return [encodable(value) for value in item]
    return item.encode("utf-8", "replace").decode() if isinstance(item, str) else item


def csv(path: Path) -> pd.DataFrame:
    """A CSV file, every value as it stands there: "None" and "007" are texts."""
    with io.BufferedReader(Unpacked(path), 2**20) as file:
        names = file.readline(LONGEST_HEADER)
    if len(names) == LONGEST_HEADER or names.count(b",") >= MOST_COLUMNS:
        raise ValueError(f"more than {MOST_COLUMNS} columns, or no line with their names")
    with io.BufferedReader(Unpacked(path), 2**20) as file:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False, nrows=MOST_ROWS + 1)
    check_count(len(frame))
    return frame


def check_count(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"more than {MOST_ROWS:,} rows; keep a part of them")


def parquet(path: Path) -> pd.DataFrame:
    limit, size, batches = largest_content(path), 0, []
    with pyarrow.parquet.ParquetFile(path) as file:
        check_count(file.metadata.num_rows)
        names = file.schema_arrow.names
        if len(names) > MOST_COLUMNS or len(set(names)) < len(names):
            raise ValueError(f"{len(names)} columns, or two of one name")
        for batch in file.iter_batches(256):
            batches.append(batch)
            size += batch.nbytes
            if size > limit:
                raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return whole_frame(pyarrow.Table.from_batches(batches, file.schema_arrow))


def whole_frame(table: pyarrow.Table) -> pd.DataFrame:
    """As a frame, in which every text is one.

    Raises:
      pyarrow.ArrowException: a text is not UTF-8; pandas would find out only when it is used.
    """
    table.validate(full=True)
    frame = table.to_pandas(ignore_metadata=True)
    return frame.astype(dict.fromkeys(frame.select_dtypes("category"), object))


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
            raise UserError(
                f"{where}, {frame.index.name} {wrong.index[0]}: '{column}' is "
                f"{brief(wrong.iloc[0])}, it must be {expected}; correct or remove the row "
                f"({len(wrong)} in all)"
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
