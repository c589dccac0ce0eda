"""What is told of every step of a training beside metrics.jsonl: TensorBoard, trackio, a function.

Off by default. RLHF_LOG_TO=tensorboard writes event files into the run's folder `tensorboard`, for
`tensorboard --logdir results/local`; RLHF_LOG_TO=trackio logs into trackio's own database, where
`trackio show` finds it. For everything else `run.ensure` takes a function.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from experiment_runs import hosts, settings
from experiment_runs.errors import UserError

StepCallback = Callable[[int, Mapping[str, Any]], None]  # step, what was logged of it
PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio"}


@contextlib.contextmanager
def tracker(path: Path, config: Mapping[str, Any]) -> Iterator[StepCallback | None]:
    """The tracker that RLHF_LOG_TO names, open while a run trains; None where it names none.

    Of several processes the first alone has one.

    Args:
      path: the run's directory, whose name the tracker shows.
      config: the run's configuration, for a tracker that shows it.

    Raises:
      UserError: its package is not installed.
    """
    asked = settings.log_to() if hosts.first() else None
    if asked is None:
        yield None
        return
    package = imported(asked)
    if asked == "tensorboard":
        writer = package.SummaryWriter(str(path / "tensorboard"))
        try:
            yield lambda step, row: add_scalars(writer, step, row)
        finally:
            writer.close()
    else:
        run = package.init(project="rlhf-jax", name=path.name, config=dict(config), resume="allow")
        try:
            yield lambda step, row: run.log(numbers(row), step=step)
        finally:
            run.finish()


def imported(asked: str) -> ModuleType:
    """The package of a tracker.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(PACKAGES[asked])
    except ModuleNotFoundError:
        raise UserError(
            f"RLHF_LOG_TO={asked}: {PACKAGES[asked]} is not installed; "
            f"pip install {PACKAGES[asked]}, or leave RLHF_LOG_TO out"
        ) from None


def add_scalars(writer: Any, step: int, row: Mapping[str, Any]) -> None:
    """Writes a row to TensorBoard at once, so that it can be watched."""
    for name, value in numbers(row).items():
        writer.add_scalar(name, value, step)
    writer.flush()


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a row; lists, as those of histograms, are left out."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
