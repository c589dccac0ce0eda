"""Downloads from the hub in a process of its own, which can be ended: `hub.download` starts it.

Called with "models" or "datasets", an id, and the patterns of a model's files or a data set's
configuration. Prints a line when it begins and at the end what went wrong, or "".
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence

import datasets
import huggingface_hub
import huggingface_hub.constants

MEMORY = 2**31  # bytes beside what the libraries take: an answer may have no end
CHUNK = 2**16  # bytes of a file that are written at a time, so that progress is seen


class Last(logging.Handler):
    """Keeps what the libraries said last."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.said = one_line(record.getMessage())


def one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


def download(kind: str, repository: str, more: Sequence[str]) -> str:
    """Fills the libraries' caches; says what went wrong, or ""."""
    try:
        if kind == "models":
            huggingface_hub.snapshot_download(repository, allow_patterns=more, etag_timeout=5)
        else:
            datasets.load_dataset(repository, *more)
    except Exception as error:  # of httpx, json, Arrow and both libraries, however an answer fails
        return one_line(str(error)) or type(error).__name__
    return ""


def main() -> None:
    last = Last()
    for library in (huggingface_hub, datasets):
        logger = logging.getLogger(library.__name__)
        logger.handlers, logger.propagate = [last], False

    def ended(number: int, frame: object) -> None:
        os.write(1, json.dumps(last.said).encode())
        os._exit(1)

    signal.signal(signal.SIGTERM, ended)
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            taken = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (taken * 1024 + MEMORY,) * 2)
    print("begun", flush=True)
    kind, repository, *more = sys.argv[1:]
    print(json.dumps(download(kind, repository, more)), flush=True)
    os._exit(0)  # threads that wait for the hub are not waited for


if __name__ == "__main__":
    main()
