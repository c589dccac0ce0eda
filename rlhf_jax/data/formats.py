"""Files of rows: JSON, CSV and Parquet, gzip or not; how much one may hold is bounded."""

import codecs
import contextlib
import csv as csv_reader
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.compute
import pyarrow.parquet

from experiment_runs.errors import UserError, first_line
from experiment_runs.foreign import check_fetched

SMALL_CONTENT = 2**26  # bytes; a file may always unpack to so many
UNPACKING = 30  # a file may unpack to so many times its size
LONGEST_LINE = 2**24  # bytes; of an array, characters of an item
LONGEST_HEADER = 2**16  # bytes
MOST_COLUMNS = 1000
MOST_ROWS = 1_000_000
ROWS_AT_A_TIME = 4096  # of a Parquet file
MANY_LINES = 100_000
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *(
    f"{text}.gz" for text in (".jsonl", ".json", ".csv", ".tsv")
))  # fmt: skip
PACKED = re.compile(r"(?i).*\.(jsonl|json|csv|tsv|parquet)\.(zst|xz|lzma|bz2|lz4|zip|7z)")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


def data_files(location: Path) -> list[Path]:
    """The files of rows in a folder and in those below it, links followed; or the one file."""
    if location.is_file():
        return [location] if is_data(Path(location.name)) else []
    found, seen = [], set()
    for folder, below, names in os.walk(location, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may go round in circles
            below.clear()
            continue
        seen.add(real)
        below.sort()
        found += [Path(folder, name) for name in names]
    return sorted(path for path in found if is_data(path.relative_to(location)))


def is_data(path: Path) -> bool:
    """False for what git, macOS and the data sets' own library leave beside the data."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    known = path.name.lower().endswith(SUFFIXES) or PACKED.fullmatch(path.name)
    return bool(known) and path.name not in DESCRIPTIONS and not hidden


def table(path: Path) -> pd.DataFrame:
    """A file of JSON, CSV or Parquet; its size, names and depth are bounded.

    Raises:
      UserError: it cannot be read, or it is not what its name says.
    """
    name = path.name.lower()
    if PACKED.fullmatch(name):
        raise UserError(f"{path}: packed in a way that is not read; unpack it, or use gzip")
    try:
        check_fetched(path)
        if name.endswith(".parquet"):
            frame = parquet(path)
        elif name.removesuffix(".gz").endswith((".json", ".jsonl")):
            return json_rows(path)
        else:
            frame = csv(path)
    except UNREADABLE as error:
        repair = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "repair it"
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); {repair} or download it again"
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
        self.file = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")
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


def json_rows(path: Path) -> pd.DataFrame:
    """JSON objects, one a line or all in one array; the index is the line, or the row."""
    rows, numbers, names = [], [], set()
    raw = Unpacked(path)
    with io.BufferedReader(raw, 2**20) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        is_array = file.peek(1).lstrip().startswith(b"[")
        objects = array_objects(file, path) if is_array else line_objects(file, path, raw)
        for number, row in objects:
            rows.append(row)
            numbers.append(number)
            if not names.issuperset(row):
                names |= row.keys()
            if len(names) > MOST_COLUMNS:
                raise ValueError(f"more than {MOST_COLUMNS} fields up to row {len(rows)}")
            check_count(len(rows))
    return pd.DataFrame(rows, index=pd.Index(numbers, name="row" if is_array else "line"))


def line_objects(file: io.BufferedReader, path: Path, raw: Unpacked) -> Iterator[tuple[int, dict]]:
    """(number, object) of every line; blank lines are passed over."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
        if number == MANY_LINES and raw.count < 20 * number:
            raise ValueError(f"{number:,} lines of less than 20 bytes each are no data")
        if len(line) > LONGEST_LINE:
            raise ValueError(f"line {number} is longer than {LONGEST_LINE:,} bytes")
        check_count(number)
        if not line.isspace():
            text = line.decode()
            with json_errors(f"{path}, line {number}"):
                row = json_object(json.loads(text))
            yield number, row


def array_objects(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, dict]]:
    """(number, object) of every item of an array, which need not fit into memory."""
    reader, decoder, number = io.TextIOWrapper(file, "utf-8"), json.JSONDecoder(), 0
    text, ended = reader.read(2 * LONGEST_LINE).lstrip(), False
    start = 1  # behind the bracket
    while True:
        if len(text) - start < LONGEST_LINE and not ended:
            more = reader.read(LONGEST_LINE)
            text, start, ended = text[start:] + more, 0, len(more) < LONGEST_LINE
        start = BLANK.match(text, start).end()
        if number == 0 and text.startswith("]", start):
            return
        number += 1
        with json_errors(f"{path}, row {number}"):
            value, end = decoder.raw_decode(text, start)
            if end - start > LONGEST_LINE:
                raise ValueError(f"longer than {LONGEST_LINE:,} characters")
            value = json_object(value)
            start = BLANK.match(text, end).end() + 1
            if text[start - 1 : start] not in ("]", ","):
                raise ValueError("no comma behind it, and no end of the array")
        yield number, value
        if text[start - 1] == "]":
            if not BLANK.fullmatch(text, start):
                raise ValueError("there is more behind the end of the array")
            return


BLANK = re.compile(r"[ \t\r\n]*")


def json_object(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError("a value of another kind than an object")
    return encodable(value)


@contextlib.contextmanager
def json_errors(where: str) -> Iterator[None]:
    """Inside, what is wrong with a value becomes one message."""
    try:
        yield
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; repair or delete it") from None
    except ValueError as error:  # among them a number of too many digits
        raise UserError(
            f"{where}: not a JSON object ({str(error).split(';')[0]}); repair or delete it: the "
            "file must hold objects, one a line or all in one array"
        ) from None


def encodable(item: object) -> object:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    if isinstance(item, dict):
        return {encodable(key): encodable(value) for key, value in item.items()}
    if isinstance(item, list):
        return [encodable(value) for value in item]
    return item.encode("utf-8", "replace").decode() if isinstance(item, str) else item


def csv(path: Path) -> pd.DataFrame:
    """A CSV file, every value as it stands there: "None" and "007" are texts.

    Columns are parted by what the line with their names has most of: commas, semicolons or tabs.
    """
    with io.BufferedReader(Unpacked(path), 2**20) as file:
        names = file.readline(LONGEST_HEADER)
    separator = max(",;\t", key=lambda mark: names.count(mark.encode()))
    if len(names) == LONGEST_HEADER or names.count(separator.encode()) >= MOST_COLUMNS:
        raise ValueError(f"more than {MOST_COLUMNS} columns, or no line with their names")
    with io.BufferedReader(Unpacked(path), 2**20) as file:
        frame = pd.read_csv(
            file, sep=separator, dtype=str, keep_default_na=False, nrows=MOST_ROWS + 1
        )
    if not isinstance(frame.index, pd.RangeIndex):  # the first values became names of rows
        raise ValueError(f"more values than names; quote texts that have {separator!r} in them")
    check_count(len(frame))
    check_quotes(path, separator)
    return frame


def check_quotes(path: Path, separator: str) -> None:
    """Raises ValueError where a text that begins with a quotation mark goes on behind the closing
    one: it was not quoted, and may have swallowed the rows up to the next mark."""
    before = csv_reader.field_size_limit(sys.maxsize)
    try:
        with io.BufferedReader(Unpacked(path), 2**20) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows = csv_reader.reader(text, delimiter=separator, strict=True)
            for _ in rows:
                pass
    except csv_reader.Error as error:
        raise ValueError(
            f"line {rows.line_num}: {error}; quote texts with quotation marks, which are written "
            "twice"
        ) from None
    finally:
        csv_reader.field_size_limit(before)


def check_count(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"more than {MOST_ROWS:,} rows; keep a part of them")


def parquet(path: Path) -> pd.DataFrame:
    """A Parquet file, read column by column; a text that many rows have stays one text until all
    are counted."""
    limit, size, columns = largest_content(path), 0, []
    schema = pyarrow.parquet.read_metadata(path).schema
    texts = [schema.column(i).path for i in range(len(schema))]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        check_count(file.metadata.num_rows)
        names = file.schema_arrow.names
        if len(names) > MOST_COLUMNS or len(set(names)) < len(names):
            raise ValueError(f"{len(names)} columns, or two of one name")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        values = sum(group.column(i).num_values for group in groups for i in range(len(schema)))
        unpacked = sum(group.total_byte_size for group in groups)
        if max(unpacked, values) > limit:  # before anything is unpacked
            raise ValueError(f"it unpacks to more than {limit:,} bytes")
        for field in file.schema_arrow:
            batches = []
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[field.name]):
                batches.append(batch)
                size += max(batch.nbytes, sum(map(written_out, batch.columns)))
                if size > limit:
                    raise ValueError(f"it unpacks to more than {limit:,} bytes")
            one = pyarrow.Table.from_batches(batches, pyarrow.schema([field]))
            columns.append(one.column(0))
        return whole_frame(pyarrow.Table.from_arrays(columns, schema=file.schema_arrow))


def written_out(column: pyarrow.Array) -> int:
    """Bytes of a column in which every row has its own copy of its text."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        lengths = pyarrow.compute.binary_length(column.dictionary.cast(pyarrow.large_binary()))
        return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
    if not types.is_nested(column.type):
        return column.nbytes
    if types.is_struct(column.type):
        parts = column.flatten()
    elif types.is_map(column.type):
        lists = pyarrow.ListArray.from_arrays
        parts = [lists(column.offsets, own).flatten() for own in (column.keys, column.items)]
    else:
        parts = [column.flatten()]
    return sum(map(written_out, parts))


def whole_frame(table: pyarrow.Table) -> pd.DataFrame:
    """As a frame, in which every text is one.

    Raises:
      pyarrow.ArrowException: a text is not UTF-8; pandas would find out only when it is used.
    """
    table.validate(full=True)
    frame = table.to_pandas(ignore_metadata=True)
    values = {name: frame[name].cat.categories.dtype for name in frame.select_dtypes("category")}
    texts = {name: kind if kind == "str" else object for name, kind in values.items()}
    return frame.astype(texts)
