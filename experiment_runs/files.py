"""JSON as runs keep it, files written whole or not at all, fingerprints of content."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment_runs.errors import UserError


def fingerprint(*parts: Any) -> str:
    """SHA-256 over texts, bytes, files (by content), arrays and JSON-able values; 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, np.ndarray):
            digest.update(encode([part.dtype.str, part.shape]).encode())
            digest.update(np.ascontiguousarray(part).data)
        elif isinstance(part, bytes):
            digest.update(hashlib.sha256(part).digest())
        else:
            digest.update(encode(part).encode() + b"\0")
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


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
      UserError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the run is not finished or was damaged") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); delete the run to train it again") from None


def read_jsonl(path: Path, *, whole: bool = True) -> list[Any]:
    """The rows of a file of JSON lines; none when it is missing.

    Args:
      path: the file.
      whole: False forgives a broken last line, which a kill in mid-write leaves behind.

    Raises:
      UserError: a line is not JSON.
    """
    rows = []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n") if text else []  # texts may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not whole and number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(encode(row) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
