"""One process at a time, by a lock that the kernel holds: a kill frees it."""

import contextlib
import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from experiment_runs import hosts
from experiment_runs.errors import UserError

UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # to this file system


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a file, which says who does.

    Of a job of several processes the first holds it for all. Where the file system knows no locks
    this is said, and the work goes on without.

    Args:
      path: the file; it stays.
      wait: for another process that holds it, or refuse.

    Raises:
      UserError: another process holds it, and `wait` is False.
      OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if hosts.first():
            while not held(stack.enter_context(opened(path)), path, wait):
                path.parent.mkdir(parents=True, exist_ok=True)  # its folder was removed meanwhile
        hosts.meet(f"lock of {path}")
        yield


def opened(path: Path) -> TextIO:
    return path.open("a+", encoding="utf-8", errors="replace")


def held(file: TextIO, path: Path, wait: bool) -> bool:
    """Acquires the lock; False where the file is no longer the one at the path."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            if not wait:
                raise UserError(
                    f"{path.parent}: {holder} is at work there; wait until it has ended"
                ) from None
            print(f"{path.parent}: waiting for {holder}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        print(
            f"{path.parent}: this file system knows no locks ({error.strerror}); start no second "
            "process on it", file=sys.stderr,
        )  # fmt: skip
    try:
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return False
    except FileNotFoundError:
        return False
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
    file.flush()
    return True
