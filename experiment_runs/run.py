"""One format of results for every stage, and run-or-load.

A run is a directory:

    config.json     stage, identity, configuration, inputs, code revision, versions, device
    metrics.jsonl   one line a step
    samples.jsonl   a few texts, where the stage makes texts
    summary.json    the results; present only when the run is finished
    *.npz           small arrays
    times.jsonl     seconds of each attempt that ended well
    checkpoints/    never in git

What identifies a run is its stage, its configuration, the fingerprints of its inputs (model, data,
upstream runs) and the two numbers below. That is all the caching there is.

The code itself is not part of the identity, or every comment would train everything again. Two
numbers stand for it, which are raised by hand:

* FORMAT, when the files of a run hold something else than before, so that older ones can no longer
  be read or continued: a field of a configuration is renamed, a checkpoint gets another tree.
* NUMERICS, when the same configuration on the same inputs gives other results than before beyond
  rounding: a repaired loss, another default of an optimizer, another stream of random numbers.

A run of other numbers is another run: never continued, never taken for one of the present code.
Runs made before there were numbers count as 0. They stay readable, and are shown as older.
"""

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs import settings
from experiment_runs.errors import UserError
from experiment_runs.files import (
    append_jsonl,
    encode,
    fingerprint,
    read_json,
    read_jsonl,
    to_plain,
    write_text,
)
from experiment_runs.process import forget_peak_memory, release_memory
from experiment_runs.provenance import code_fingerprint, provenance

FORMAT = 1
NUMERICS = 1


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
    def older(self) -> str:
        """Which of its numbers are below those of the present code, in words; "" for none."""
        present = {"format": FORMAT, "numerics": NUMERICS}
        below = [name for name, number in present.items() if self.record.get(name, 0) < number]
        return f"older {' and '.join(below)}" if below else ""

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
    root = Path(root or settings.results())
    config = to_plain(dataclasses.asdict(config))
    numbers = {"format": FORMAT, "numerics": NUMERICS}
    identity = fingerprint(stage, config, dict(sorted(inputs.items())), numbers)
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
            record |= numbers | {"about": dict(about or {})} | provenance()
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


def code_since(run: Run) -> str:
    """What has become of the libraries' sources since they made a run, in words.

    "the same"; "changed", which should give the same results; or which of the run's numbers are
    older, after which the same configuration gives other results.
    """
    return run.older or ("the same" if run.record.get("code") == code_fingerprint() else "changed")
