"""The Hugging Face hub: whether it answers, and downloads that end however its answers fail."""

import contextlib
import functools
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub.constants
import pandas as pd
from datasets.naming import camelcase_to_snakecase
from tqdm import tqdm

from experiment_runs import settings
from experiment_runs.errors import UserError, brief, first_line
from experiment_runs.process import progress
from rlhf_jax.data.formats import whole_frame

PROGRAM = Path(__file__).with_name("download.py")
LARGEST = 10**11  # bytes of a download
UNREACHABLE = "it does not answer, or HF_HUB_OFFLINE is set"


def on_hub(repository: str) -> bool:
    """True when the hub answers or an earlier download of this data set is in the cache."""
    owner, name = repository.split("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}")
    return reachable() or cache.is_dir()


@functools.cache
def reachable(seconds: float = 3.0) -> bool:
    """True when the hub answers in time; asked once a process, never in offline mode."""
    if datasets.config.HF_HUB_OFFLINE:
        return False
    address = huggingface_hub.constants.ENDPOINT
    if not address.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT={brief(address)}: write the hub's address with https://")
    request = urllib.request.Request(address, method="HEAD")
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            try:
                urllib.request.urlopen(request, timeout=seconds).close()
                answered.set()
            except urllib.error.HTTPError as error:
                error.close()

    # A thread, because looking up the address of the hub has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def download(kind: str, repository: str, *more: str) -> str:
    """Downloads a model or a data set into the libraries' caches; says what failed, or "".

    A process of its own does it, which is ended when it has written nothing for
    RLHF_HUB_SECONDS (where the system tells what it writes, as Linux does), or too much.

    Args:
      kind: "models" or "datasets".
      repository: "owner/name".
      *more: patterns of a model's files; the configuration of a data set.
    """
    if not reachable():
        return UNREACHABLE
    constants, patience = huggingface_hub.constants, settings.hub_seconds()
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-P", "-W", "ignore", str(PROGRAM), kind, repository, *more]
    with (
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        ) as process,
        progress(label=f"{repository} (MB)") as bar,
    ):  # fmt: skip
        try:
            process.stdout.readline()  # it has begun
            stopped = watch(process, bar, patience)
        finally:
            end(process)
        said = process.stdout.read()
    with contextlib.suppress(ValueError):
        said = json.loads(said)
    if process.returncode == 0:
        return said
    stopped = stopped or f"the download ended with {process.returncode}"
    return f"{stopped} ({said})" if said else stopped


def watch(process: subprocess.Popen, bar: tqdm, patience: float) -> str:
    """Waits for the end of a download; says why it must be stopped, or "" when it has ended."""
    started, last, since = written_bytes(process), 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        written = written_bytes(process) - started
        if written > last:
            last, since = written, time.monotonic()
            bar.n = written // 10**6
            bar.refresh()
        elif time.monotonic() - since > patience:
            return f"nothing came for {patience:g} seconds"
        if written > LARGEST:
            return f"more than {LARGEST:,} bytes came"
    return ""


def written_bytes(process: subprocess.Popen) -> int:
    """What a process has written so far; where no system tells, more at every question."""
    try:
        counts = Path(f"/proc/{process.pid}/io").read_text()
        return int(counts.split("wchar:")[1].split()[0])
    except (OSError, IndexError):
        return time.monotonic_ns() // 10**9


def end(process: subprocess.Popen) -> None:
    """Ends a process; after a second of its own time, at once."""
    process.terminate()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def from_cache() -> Iterator[None]:
    """Inside, `datasets` asks nobody, which would take it 25 seconds where nobody answers."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def hub_frame(repository: str, columns: Sequence[str]) -> pd.DataFrame:
    """All splits of a data set on the hub; column `split` says which.

    An earlier download is read where the hub fails, which is said.

    Args:
      repository: "owner/name", or "owner/name:configuration".
      columns: those of interest; a split that has none of them is read with all that it has.

    Raises:
      UserError: the data set cannot be loaded.
    """
    failed = download("datasets", *repository.split(":"))
    try:
        with from_cache():
            parts = datasets.load_dataset(*repository.split(":"))
            frames = [
                whole_frame(
                    part.select_columns(
                        [name for name in part.column_names if name in columns] or part.column_names
                    ).with_format("arrow")[:]
                ).assign(split=split)
                for split, part in parts.items()
            ]
    except Exception as error:  # of datasets and Arrow, which share no class of errors
        raise UserError(
            f"{repository}: cannot be loaded from the hub ({failed or 'no rows'}) nor from an "
            f"earlier download ({first_line(error)}); try again (one configuration of several is "
            "OWNER/NAME:CONFIGURATION), give a local copy as the data directory, or set "
            "HF_HUB_OFFLINE=1 to use the stand-in"
        ) from error
    if failed not in ("", UNREACHABLE):
        print(f"{repository}: the hub failed ({failed}); read as it was before", file=sys.stderr)
    return pd.concat(frames, ignore_index=True)
