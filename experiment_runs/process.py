"""The process that trains: its memory, its progress bars, its processor."""

import contextlib
import ctypes
import gc
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from tqdm import tqdm

from experiment_runs import hosts
from experiment_runs.settings import progress_wanted


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


def progress(items: Iterable | None = None, *, label: str, total: int | None = None, initial=0):
    """A bar on standard error with the remaining time; silent where nobody watches."""
    watched = (sys.stderr.isatty() or progress_wanted()) and hosts.first()
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


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_gb() -> float:
    """Most memory in use so far: the accelerator's where there is one, else the process's."""
    if statistics := jax.local_devices()[0].memory_stats():
        return statistics["peak_bytes_in_use"] / 1e9
    units = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units
