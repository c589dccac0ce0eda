"""JSON as runs keep it, files written whole or not at all, fingerprints of content."""

import errno
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment_runs.errors import UserError, brief, first_line

LARGEST = 2**24  # bytes of a file that is read whole; as JSON it takes 24 times as much
LARGEST_LOG = 3 * LARGEST  # of one of a JSON object a line
DEEPEST = 100  # levels of JSON; what goes over them calls itself
HALVES = "backslashreplace"  # of surrogate pairs, as file names may hold: JSON writes them so


def fingerprint(*parts: Any) -> str:
    """SHA-256 over texts, bytes, files (by content), arrays and JSON-able values; 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, np.ndarray):
            digest.update(encode([part.dtype.str, part.shape]).encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        elif isinstance(part, bytes):
            digest.update(hashlib.sha256(part).digest())
        else:
            digest.update(encode(part).encode(errors=HALVES) + b"\0")
    return digest.hexdigest()[:16]


def to_plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts that JSON can hold; not-a-number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(value: Any, indent: int | None = None) -> str:
    """JSON text, the same for the same value."""
    return json.dumps(to_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def read_json(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
      UserError: it is missing or broken.
    """
    try:
        return json_object(read_whole(path, largest))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the run is not finished or was damaged") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); restore the file") from None


def read_jsonl(path: Path, *, whole: bool = True, **fields: type) -> list[Any]:
    """The rows of a file of JSON lines; none when it is missing.

    Args:
      path: the file.
      whole: False leaves out a broken last line, which a kill in mid-write leaves behind, and says
        so.
      **fields: what every row must hold, and of what type.

    Raises:
      UserError: a line is not a JSON object, or lacks a field.
    """
    try:
        content = read_whole(path, LARGEST_LOG)
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    lines = content.removesuffix(b"\n").split(b"\n") if content else []  # texts may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            row = json_object(line)
        except (ValueError, RecursionError) as error:
            reason = f"{path}, line {number}: not JSON ({first_line(error)})"
            if whole or number < len(lines):
                raise UserError(f"{reason}; restore or remove the line") from None
            print(f"{reason}; it was cut off and is left out", file=sys.stderr)
        else:
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    raise UserError(
                        f"{path}, line {number}: '{name}' is {brief(row.get(name))}; restore or "
                        "remove the line"
                    )
            rows.append(row)
    return rows


def read_whole(path: Path, largest: int = LARGEST) -> bytes:
    """All of a file.

    Raises:
      UserError: it is no regular file, from which reading might never end, or larger than that.
      OSError: it cannot be opened.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a regular file; put the file itself there")
    if found.st_size > largest:
        raise UserError(
            f"{path}: {found.st_size:,} bytes, at most {largest:,} are read; restore the file"
        )
    return path.read_bytes()


def json_object(content: bytes) -> dict[str, Any]:
    """What bytes of JSON stand for.

    Raises:
      ValueError, RecursionError: they are no object, one that is nested without end, or one with a
        number that is not finite.
    """
    value = json.loads(content.decode(), parse_float=finite, parse_int=whole, parse_constant=finite)
    if not isinstance(value, dict):
        raise ValueError(f"{brief(value)} is not an object")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def finite(text: str) -> float:
    """A number of JSON, which has no word for others.

    Raises:
      ValueError: it is another.
    """
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


def whole(text: str) -> int:
    """A whole number of JSON, which a float can hold too.

    Raises:
      ValueError: it is too large.
    """
    finite(text)
    return int(text)


def utf8(text: str, name: str) -> str:
    """The text itself, which a terminal may have given in another encoding.

    Raises:
      UserError: it holds bytes that are none of UTF-8; `name` is what it was given for.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} {brief(text)}: not UTF-8; write it in that encoding") from None
    return text


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8", errors=HALVES) as file:
        file.write(encode(row) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, even if the machine stops in between."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("w", encoding="utf-8", errors=HALVES) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def concerns(error: OSError, root: Path) -> bool:
    """Whether an error is about a file in a folder, or a disk that is full, which names none."""
    if not isinstance(error.filename, str | os.PathLike):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Path(error.filename).absolute().is_relative_to(root.absolute())
