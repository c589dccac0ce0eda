"""Where rows come from: local files, or the Hugging Face hub when it answers.

Files are validated here: a missing column, an empty or broken file is one message that names file,
line and remedy.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import json
import math
import threading
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub.constants
import pandas as pd
from datasets.naming import camelcase_to_snakecase

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint

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
        is_json = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
        frame = json_lines(path) if is_json else table(path)
        if frame.empty:
            raise UserError(f"{path}: the file has no rows; remove it or download it again")
        missing = [column for column in columns if column not in frame]
        if missing:
            raise UserError(
                f"{path}: no column {', '.join(map(repr, missing))}; it has "
                f"{', '.join(map(str, frame.columns))}. Rename or add what is missing"
            )
        yield path, frame


def is_data(path: Path) -> bool:
    """False for what git, macOS and the data sets' own library leave beside the data."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.name.endswith(SUFFIXES) and path.name not in DESCRIPTIONS and not hidden


def json_lines(path: Path) -> pd.DataFrame:
    """One JSON object a line; blank lines are passed over."""
    rows, numbers = [], []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(json_object(line, f"{path}, line {number}"))
                    numbers.append(number)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None
    return pd.DataFrame(rows, index=pd.Index(numbers, name="line"))


def json_object(line: str, where: str) -> dict:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}); repair or delete the line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; the file must hold one object a line")
    return {key: encodable(item) for key, item in value.items()}


def encodable(item: object) -> object:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    return item.encode("utf-8", "replace").decode() if isinstance(item, str) else item


def table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file."""
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else text_table(path)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name="row"))


def text_table(path: Path) -> pd.DataFrame:
    """A CSV file, every value as it stands there: "None" and "007" are texts."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def on_hub(repository: str) -> bool:
    """True when the hub answers or an earlier download of this data set is in the cache."""
    owner, name = repository.split("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}")
    return hub_reachable() or cache.is_dir()


@functools.cache
def hub_reachable(seconds: float = 3.0) -> bool:
    """True when the hub answers in time; asked once a process, never in offline mode."""
    if datasets.config.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen(request, timeout=seconds).close()
            answered.set()

    # A thread, because looking up the address of the hub has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def hub_frame(repository: str, columns: Sequence[str]) -> pd.DataFrame:
    """All splits of a data set on the hub; column `split` says which.

    Args:
      repository: "owner/name", or "owner/name:configuration".
      columns: those of interest; a split that has none of them is read with all that it has.

    Raises:
      UserError: the data set cannot be loaded.
    """
    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # read the cache at once, not after 25 s of retries
    try:
        parts = datasets.load_dataset(*repository.split(":"))
        frames = [
            part.select_columns(
                [column for column in columns if column in part.column_names] or part.column_names
            )
            .to_pandas()
            .assign(split=name)
            for name, part in parts.items()
        ]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{repository}: cannot be loaded from the hub ({error}); try again, give a local copy "
            "as the data directory, or set HF_HUB_OFFLINE=1 to use the stand-in"
        ) from None
    return pd.concat(frames, ignore_index=True)


def is_text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: isinstance(value, str) and bool(value.strip())).astype(bool)


def is_text_or_empty(column: pd.Series) -> pd.Series:
    return column.map(lambda value: isinstance(value, str)).astype(bool) | column.isna()


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
