"""Where files from outside are read by libraries from outside: bounded in time, one message."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from experiment_runs.errors import UserError, first_line


@contextlib.contextmanager
def readable(what: object, kind: str) -> Iterator[None]:
    """Inside, anything but a message of ours becomes one.

    The readers of these files (tokenizers, jinja2, safetensors, gguf, orbax, datasets) raise errors
    of any kind for what is broken, and share no class of them.

    Args:
      what: is read: a path or the id of a repository.
      kind: what it should be, for the message.

    Raises:
      UserError: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{what}: cannot be read as {kind} ({type(error).__name__}: {first_line(error)}); "
            "download it again or name another"
        ) from error


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Ends what Python code takes longer than it may; in the main thread, which signals reach.

    Raises:
      TimeoutError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"{what} takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
