"""What may be wrong with a file of any kind: bytes, a value at any depth, what it is at all."""

import os
import random
from pathlib import Path
from typing import Any

VALUES = [
    None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", " ", "x" * 10**6,
    "\ud800", "\x00", "7" * 5000, [], [1, [2]], {}, {"a": {"b": []}}, ["x"] * 1000, "2024-01-01",
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file that was cut, flipped, doubled, filled, encoded otherwise or replaced."""
    at = rng.randrange(max(len(content), 1))
    return rng.choice([
        lambda: content[:at],
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + bytes(rng.randrange(1, 5000)) + content[at:],
        lambda: content + content[at:],
        lambda: rng.randbytes(rng.randrange(3000)),
        lambda: b"",
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"<!DOCTYPE html><html>not found</html>",
        lambda: b"[" * 10**5,
        lambda: b'{"a": ' * 10**4 + b"1" + b"}" * 10**4,
    ])()  # fmt: skip


def special_file(path: Path, rng: random.Random) -> None:
    """Something that is no regular file, or one without end, in the place of a file."""
    if rng.random() < 0.2:
        os.truncate(path, 2**36)  # the file itself, and a hole behind it
        return
    path.unlink(missing_ok=True)
    rng.choice([
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("nothing"),
        lambda: path.mkdir(),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**42),
    ])()  # fmt: skip


def misplaced(tree: Any, rng: random.Random) -> Any:
    """JSON in which one value, at any depth, is another one."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(VALUES)
    copy = tree.copy()
    key = rng.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
    copy[key] = misplaced(tree[key], rng)
    return copy
