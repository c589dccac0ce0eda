"""One format of results for every stage, and run-or-load.

A run is a directory:

    config.json     stage, identity, configuration, inputs, code revision, versions, device
    metrics.jsonl   one line a step
    samples.jsonl   a few texts, where the stage makes texts
    summary.json    the results; present only when the run is finished
    *.npz           small arrays
    times.jsonl     seconds of each attempt that ended well
    checkpoints/    never in git
    lock            held by the process that trains

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
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs import hosts, settings
from experiment_runs.errors import UserError, brief
from experiment_runs.files import (
    append_jsonl,
    concerns,
    encode,
    fingerprint,
    read_json,
    read_jsonl,
    to_plain,
    write_text,
)
from experiment_runs.lock import locked
from experiment_runs.npz import read_npz, too_large
from experiment_runs.precision import check_32_bits
from experiment_runs.process import forget_peak_memory, release_memory
from experiment_runs.provenance import provenance
from experiment_runs.signals import heard
from experiment_runs.tracking import StepCallback, tracker

RECORD = {"stage": str, "identity": str, "config": dict, "inputs": dict, "about": dict}  # at least

FORMAT = 1
NUMERICS = 3
NUMBERS = ("format", "numerics")  # as config.json calls them

KEPT = "metrics.jsonl", "samples.jsonl", "[!.]*.npz"  # no one changes them after the end

RENAMED = {"gold": "second_reward"}  # stages and keys of older runs, and what they are called now


class Run:
    """A directory of results, finished or not."""

    def __init__(self, path: Path, checkpoints: Path | None = None):
        self.path = Path(path)
        self.checkpoints = checkpoints or self.path / "checkpoints"
        self.step_callbacks: list[StepCallback] = []  # called with every row that is logged
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path}: not a run, it has no config.json; name a run directory")

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """All of config.json: configuration, inputs and provenance.

        Raises:
          UserError: it is broken.
        """
        path = self.path / "config.json"
        record = read_json(path)
        numbers = {name: int for name in NUMBERS if name in record}
        for name, kind in (RECORD | numbers).items():
            if not isinstance(record.get(name), kind):
                raise UserError(f"{path}: '{name}' is {brief(record.get(name))}; restore the file")
        if len(numbers) == len(NUMBERS) and identity_of(record) != record["identity"]:
            raise UserError(f"{path}: its identity is not that of its settings; restore the file")
        for name, value in record["inputs"].items():
            if not isinstance(value, str):
                raise UserError(f"{path}: input '{name}' is {brief(value)}; restore the file")
        return renamed(record)

    @property
    def stage(self) -> str:
        return RENAMED.get(self.record["stage"], self.record["stage"])

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
        """Whether there is a summary that can be read and is of this very configuration."""
        return (self.path / "summary.json").exists() and self.damage is None

    def require_finished(self) -> None:
        """Raises UserError where there is more to train."""
        if not self.finished:
            raise UserError(f"{self.path}: the run is not finished; train it to the end first")

    @property
    def damage(self) -> str | None:
        """What keeps summary.json from being read, in words."""
        try:
            _ = self.summary
        except UserError as error:
            return str(error)
        return None

    @property
    def summary(self) -> dict[str, Any]:
        """The results.

        Raises:
          UserError: summary.json is missing, broken or of another configuration.
        """
        return renamed(self._read_summary()[0])

    def _read_summary(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The results, and the fingerprints of the files that were there when they were written."""
        path = self.path / "summary.json"
        summary = read_json(path)
        if summary.pop("identity", None) != self.identity:
            raise UserError(f"{path}: not of the configuration in config.json; restore the file")
        if summary.pop("content", "") not in ("", fingerprint(summary)):
            raise UserError(f"{path}: something in it was changed; restore the file")
        return summary, summary.pop("files", {})

    def metrics(self) -> pd.DataFrame:
        """The logged rows in order; a row lacks the columns that it was not logged with."""
        return pd.DataFrame(self._unchanged("metrics.jsonl", read_jsonl))

    def samples(self, **fields: type) -> list[dict[str, Any]]:
        return self._unchanged("samples.jsonl", read_jsonl, **fields)

    def arrays(self, name: str = "arrays") -> dict[str, np.ndarray]:
        return renamed(self._unchanged(f"{name}.npz", read_npz, problems_of=too_large))

    def _unchanged(self, name: str, read: Callable, **options: Any) -> Any:
        """What is read of a file, which must be as it was when the run was finished."""
        path = self.path / name
        content = read(path, **options)
        try:
            expected = self._read_summary()[1].get(name)
        except UserError:  # the run is not finished
            return content
        if expected and not (path.exists() and fingerprint(path) == expected):
            raise UserError(f"{path}: not as it was when the run was finished; restore the file")
        return content

    def log(self, *, step: int, **row: Any) -> None:
        """Appends one line to metrics.jsonl and tells it to whoever follows the training."""
        append_jsonl(self.path / "metrics.jsonl", {"step": step, **row})
        for callback in self.step_callbacks:
            callback(step, row)

    def sample(self, *, step: int, **row: Any) -> None:
        """Appends one line to samples.jsonl."""
        append_jsonl(self.path / "samples.jsonl", {"step": step, **row})

    def save_arrays(self, name: str = "arrays", **arrays: np.ndarray) -> None:
        scratch = self.path / f".{name}.npz"
        np.savez_compressed(scratch, **arrays)
        scratch.replace(self.path / f"{name}.npz")

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, to continue from the checkpoint of that step.

        Raises:
          UserError: a line is broken, other than the last one, or the log ends before that step.
        """
        reached = 0
        for name in ("samples.jsonl", "metrics.jsonl"):
            path = self.path / name
            if path.exists():
                rows = read_jsonl(path, whole=False, step=int)
                kept = [row for row in rows if row["step"] <= step]
                write_text(path, "".join(encode(row) + "\n" for row in kept))
                reached = kept[-1]["step"] if kept else 0
        if reached < step:
            raise UserError(
                f"{self.path}/metrics.jsonl: ends at step {reached}, and the checkpoint is of step "
                f"{step}; restore the file, or remove {self.checkpoints}/resume to begin anew"
            )

    def finish(self, **summary: Any) -> None:
        """Writes summary.json, which marks the run as finished, and holds what its files hold."""
        kept = (path for pattern in KEPT for path in sorted(self.path.glob(pattern)))
        summary |= {"files": {path.name: fingerprint(path) for path in kept}}
        summary = {"identity": self.identity, "content": fingerprint(summary)} | summary
        write_text(self.path / "summary.json", encode(summary, indent=1) + "\n")


def ensure(
    stage: str,
    config: Any,
    train: Callable[[Run], None],
    *,
    inputs: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    root: Path | None = None,
    on_step: StepCallback | None = None,
) -> Run:
    """Returns the finished run of exactly this configuration and these inputs, training if needed.

    A run that was cut off is handed to `train` again, which resumes from `run.checkpoints`. Only
    one process trains a run; another one waits for it.

    Args:
      stage: name of the stage, e.g. "reward"; the run's directory starts with it.
      config: a frozen dataclass, stored as `dataclasses.asdict`.
      train: does the work; must end with `run.finish(...)`.
      inputs: fingerprints of the model, the data and the upstream runs.
      about: what these are, in words, for the report; not part of the identity.
      root: directory of the runs; results/local by default.
      on_step: called with the step and what was logged of it, after every step that is trained.

    Raises:
      UserError: the results directory cannot be written.
      Stopped: by a signal; what was reached is saved.
    """
    root = Path(root or settings.results())
    own = {"config": to_plain(dataclasses.asdict(config)), "inputs": dict(inputs)}
    own = {"stage": stage, **own, "format": FORMAT, "numerics": NUMERICS}
    identity = identity_of(own)
    record = own | {"identity": identity, "about": dict(about or {})}
    path = root / f"{stage}-{identity[:10]}"
    try:
        if is_recorded(path, identity) and Run(path).finished:
            return Run(path)
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / "lock", wait=True):
            if hosts.first() and not is_recorded(path, identity):
                text = encode(record | provenance(), indent=1)
                write_text(path / "config.json", text + "\n")
            hosts.meet(f"record of {path}")
            run = Run(path)
            if not run.finished:
                with hosts.own_copy(path) as own:
                    train_to_end(Run(own, run.checkpoints), train, on_step)
                hosts.meet(f"end of {path}")
    except OSError as error:
        if not concerns(error, root):
            raise
        raise UserError(
            f"{root!s:.300}: results cannot be written there ({error.strerror}); "
            "make it writable or name another folder in RLHF_RESULTS"
        ) from None
    return run


def identity_of(record: Mapping[str, Any]) -> str:
    """What the parts of a run's record stand for."""
    numbers = {name: record.get(name) for name in NUMBERS}
    inputs = dict(sorted(record["inputs"].items()))
    return fingerprint(record["stage"], record["config"], inputs, numbers)


def renamed(found: Any) -> Any:
    """What was read of a run, under today's names; "ppo-full.gold" is a key of two names."""
    if not isinstance(found, dict):
        return found
    return {
        ".".join(RENAMED.get(name, name) for name in key.split(".")): renamed(value)
        for key, value in found.items()
    }


def is_recorded(path: Path, identity: str) -> bool:
    """Whether config.json is there, whole and of this identity; says what is wrong with it."""
    if not (path / "config.json").exists():
        return False
    try:
        found = Run(path).identity
    except UserError as error:
        print(f"{error}. It is written anew, nothing else changes.", file=sys.stderr)
        return False
    if found != identity:
        print(f"{path}/config.json: of another run; it is written anew", file=sys.stderr)
    return found == identity


def train_to_end(
    run: Run, train: Callable[[Run], None], on_step: StepCallback | None = None
) -> None:
    """Has a run trained to its end.

    Raises:
      UserError: JAX is set to 64 bits, or there is a summary that cannot be used: the run may have
        been finished, and its weights would be written over.
    """
    check_32_bits()
    if (run.path / "summary.json").exists():
        raise UserError(
            f"{run.damage}, or move {run.path} elsewhere: it was trained to its end, and would be "
            "trained again in the place of what it holds"
        )
    started = time.monotonic()
    forget_peak_memory()
    with heard(), tracker(run.path, run.config) as tracked:
        followed = (tracked, on_step) if hosts.first() else ()
        run.step_callbacks = [callback for callback in followed if callback]
        train(run)
    release_memory()
    if not run.finished:
        raise RuntimeError(f"{run.path}: the stage returned without run.finish()")
    hosts.meet(f"summary of {run.checkpoints}")
    if hosts.first():
        shutil.rmtree(run.checkpoints / "resume", ignore_errors=True)
    append_jsonl(run.path / "times.jsonl", {"seconds": time.monotonic() - started})
