"""One format of results for every stage, and run-or-load.

A run is a directory:

    config.json     stage, identity, configuration, inputs, code revision, versions, device
    metrics.jsonl   one line a step
    samples.jsonl   a few texts, where the stage makes texts
    summary.json    the results; present only when the run is finished
    *.npz           small arrays
    times.jsonl     seconds of each attempt that ended well
    checkpoints/    never in git

What identifies a run is its stage, its configuration and the fingerprints of its inputs (model,
data, upstream runs). That is all the caching there is.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
LOCAL = PROJECT / "results" / "local"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "numpy",
)


class UserError(Exception):
    """Bad input. The message names the file, the field and the remedy."""


class Run:
    """A directory of results, finished or not."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path}: not a run, it has no config.json; name a run directory")

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """All of config.json: configuration, inputs and provenance."""
        return read_json(self.path / "config.json")

    @property
    def stage(self) -> str:
        return self.record["stage"]

    @property
    def identity(self) -> str:
        return self.record["identity"]

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def about(self) -> dict[str, Any]:
        """Profile, model and data in words."""
        return self.record["about"]

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def metrics(self) -> pd.DataFrame:
        """The logged rows in order; a row lacks the columns that it was not logged with."""
        return pd.DataFrame(read_jsonl(self.path / "metrics.jsonl"))

    def samples(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "samples.jsonl")

    def arrays(self, name: str = "arrays") -> dict[str, np.ndarray]:
        with np.load(self.path / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    def log(self, *, step: int, **row: Any) -> None:
        """Appends one line to metrics.jsonl."""
        append_jsonl(self.path / "metrics.jsonl", {"step": step, **row})

    def sample(self, *, step: int, **row: Any) -> None:
        """Appends one line to samples.jsonl."""
        append_jsonl(self.path / "samples.jsonl", {"step": step, **row})

    def save_arrays(self, name: str = "arrays", **arrays: np.ndarray) -> None:
        scratch = self.path / f".{name}.npz"
        np.savez_compressed(scratch, **arrays)
        scratch.replace(self.path / f"{name}.npz")

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, to continue from the checkpoint of that step."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [row for row in read_jsonl(path, whole=False) if row["step"] <= step]
                write_text(path, "".join(encode(row) + "\n" for row in kept))

    def finish(self, **summary: Any) -> None:
        """Writes summary.json, which marks the run as finished."""
        write_text(self.path / "summary.json", encode(summary, indent=1) + "\n")


def ensure(
    stage: str,
    config: Any,
    train: Callable[[Run], None],
    *,
    inputs: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    root: Path | None = None,
) -> Run:
    """Returns the finished run of exactly this configuration and these inputs, training if needed.

    A run that was cut off is handed to `train` again, which resumes from `run.checkpoints`.

    Args:
      stage: name of the stage, e.g. "reward"; the run's directory starts with it.
      config: a frozen dataclass, stored as `dataclasses.asdict`.
      train: does the work; must end with `run.finish(...)`.
      inputs: fingerprints of the model, the data and the upstream runs.
      about: what these are, in words, for the report; not part of the identity.
      root: directory of the runs; results/local by default.

    Raises:
      UserError: the results directory cannot be written.
    """
    root = Path(root or os.environ.get("RLHF_RESULTS") or LOCAL)
    config = to_plain(dataclasses.asdict(config))
    identity = fingerprint(stage, config, dict(sorted(inputs.items())))
    path = root / f"{stage}-{identity[:10]}"
    if not (path / "config.json").exists():
        try:
            path.mkdir(parents=True, exist_ok=True)
            record = {
                "stage": stage,
                "identity": identity,
                "config": config,
                "inputs": dict(inputs),
            }
            record |= {"about": dict(about or {})} | provenance()
            write_text(path / "config.json", encode(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"{root}: results cannot be written there ({error.strerror}); "
                "make it writable or name another folder in RLHF_RESULTS"
            ) from None
    run = Run(path)
    if not run.finished:
        started = time.monotonic()
        forget_peak_memory()
        train(run)
        release_memory()
        if not run.finished:
            raise RuntimeError(f"{path}: the stage returned without run.finish()")
        shutil.rmtree(run.checkpoints / "resume", ignore_errors=True)
        append_jsonl(path / "times.jsonl", {"seconds": time.monotonic() - started})
    return run


def release_memory() -> None:
    """Gives back what a stage no longer needs: gigabytes, which the next stage would add to."""
    gc.collect()  # modules refer to each other in cycles
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Lets the peak of this process's memory be that of the stage to come, where Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def find(stage: str, root: Path) -> Run:
    """The finished run of `stage` in a folder of committed runs, e.g. results/reference.

    Raises:
      UserError: there is none.
    """
    for path in sorted(Path(root).glob(f"{stage}*/config.json")):
        run = Run(path.parent)
        if run.stage == stage and run.finished:
            return run
    raise UserError(f"{root}: no finished run of stage '{stage}'; available: {available(root)}")


def available(root: Path) -> str:
    """The stages that have a run in `root`, for messages."""
    return ", ".join(sorted(p.parent.name for p in Path(root).glob("*/config.json"))) or "none"


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


def code_changed_since(run: Run) -> bool:
    """True when the libraries' sources differ from those that made the run."""
    return run.record.get("code") != code_fingerprint()


@functools.cache
def code_fingerprint() -> str:
    """Fingerprint of the sources of both libraries."""
    sources = sorted([*PROJECT.glob("rlhf_jax/*.py"), *PROJECT.glob("gan_jax/*.py")])
    return fingerprint(*sources)


def progress(items: Iterable | None = None, *, label: str, total: int | None = None, initial=0):
    """A bar on standard error with the remaining time; silent where nobody watches."""
    watched = sys.stderr.isatty() or bool(os.environ.get("RLHF_PROGRESS"))
    return tqdm(
        items,
        desc=label,
        total=total,
        initial=initial,
        disable=not watched,
        mininterval=1 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        smoothing=0.1,
    )


def provenance() -> dict[str, Any]:
    """What a reader needs to trust or repeat a run: code, versions, device, time."""
    import jax

    device = jax.devices()[0]
    return {
        "git": git_revision(),
        "code": code_fingerprint(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": f"{device.platform}: "
        f"{processor() if device.platform == 'cpu' else device.device_kind}",
        "cores": os.cpu_count(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_revision() -> str:
    """Short revision, with "+" when there are uncommitted changes; "unknown" without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=PROJECT, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


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


def read_jsonl(path: Path, *, whole: bool = True) -> list[dict[str, Any]]:
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
