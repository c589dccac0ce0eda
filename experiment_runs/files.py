"""JSON as runs keep it, files written whole or not at all, fingerprints of content."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment_runs.errors import UserError, brief, first_line

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


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
      UserError: it is missing or broken.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the run is not finished or was damaged") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {brief(value)}, not an object; restore the file")
    return value


def read_jsonl(path: Path, *, whole: bool = True) -> list[Any]:
    """The rows of a file of JSON lines; none when it is missing.

    Args:
      path: the file.
      whole: False leaves out a broken last line, which a kill in mid-write leaves behind, and says
        so.

    Raises:
      UserError: a line is not a JSON object.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    lines = content.removesuffix(b"\n").split(b"\n") if content else []  # texts may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError(f"{brief(row)} is not an object")
        except (ValueError, RecursionError) as error:
            reason = f"{path}, line {number}: not JSON ({first_line(error)})"
            if whole or number < len(lines):
                raise UserError(f"{reason}; restore or remove the line") from None
            print(f"{reason}; it was cut off and is left out", file=sys.stderr)
        else:
            rows.append(row)
    return rows


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
