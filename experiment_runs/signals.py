"""SIGINT and SIGTERM while a stage trains: its state is saved before the process ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from experiment_runs.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Which signal has come, and whether a training is there that looks for it between steps."""

    number: int | None = None
    heeded = False


ASKED = Asked()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, a signal waits until a training that can save has saved; a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield
    finally:
        ASKED.number, ASKED.heeded = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def hear(number: int, frame: object) -> None:
    if ASKED.number is not None or not ASKED.heeded:
        raise Stopped(number)
    ASKED.number = number
    os.write(2, b"\nstopping after this step, which is saved first; once more to stop at once\n")
