"""Several processes that train together, on one host or on many.

RLHF_HOSTS says how they find each other: `auto` asks the cluster that JAX detects (SLURM and Open
MPI, where every process gets the one GPU of its local number; Kubernetes);
ADDRESS:PORT/COUNT/NUMBER names the first process, how many there are, and which of them this one
is, from 0, with all GPUs of its host. All run the same command on the same inputs, on a file system
that all of them see. The first writes the run; the others write their own copy of its small files
into a folder that goes away, so that they know what it knows. Checkpoints are written by all.
"""

import contextlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiment_runs import settings
from experiment_runs.errors import UserError, first_line

ABSENT = 300  # seconds in which the first process must have begun
SILENT = 60  # seconds after which a process that says nothing counts as ended
# What the collectives of JAX's backends say, in errors of several classes, when one of them ends.
ENDED = re.compile("gloo|nccl|coordination service|connection (closed|reset)", re.IGNORECASE)
EXPLICIT = re.compile(r"(\S+:\d+)/(\d{1,6})/(\d{1,6})")


def join() -> None:
    """Joins the other processes, if RLHF_HOSTS names any; before anything else is asked of JAX.

    Raises:
      UserError: it cannot be read, or there is no such cluster.
    """
    asked = settings.hosts()
    if not asked or jax.distributed.is_initialized():
        return
    options = {"heartbeat_timeout_seconds": SILENT, "shutdown_timeout_seconds": SILENT}
    if asked != "auto":
        found = EXPLICIT.fullmatch(asked)
        if not found or int(found[3]) >= int(found[2]):
            raise UserError(
                f"RLHF_HOSTS={asked}: write auto, or ADDRESS:PORT/COUNT/NUMBER with a number from "
                "0 to COUNT - 1, as 10.0.0.1:4217/2/0"
            )
        options |= {
            "coordinator_address": found[1],
            "num_processes": int(found[2]),
            "process_id": int(found[3]),
            "cluster_detection_method": "deactivate",
        }
        print(f"process {found[3]} of {found[2]} meets the others at {found[1]}", file=sys.stderr)
        if int(found[3]) > 0:
            wait_for(found[1])
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"RLHF_HOSTS={asked}: the processes did not find each other ({first_line(error)}); "
            "start all of them, or write ADDRESS:PORT/COUNT/NUMBER"
        ) from error
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def wait_for(address: str) -> None:
    """Waits until the first process listens: JAX would end this one with a stack of C++.

    Raises:
      UserError: it does not.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + ABSENT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"RLHF_HOSTS: nobody listens at {address} after {ABSENT} seconds ({error}); "
                    "start process 0 there, and see that this host reaches it"
                ) from None
        time.sleep(1)


def several() -> bool:
    """Whether this process is one of several; asks nothing of the devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lost(error: BaseException) -> bool:
    """Whether it was raised because another process of the job has ended."""
    unknown = isinstance(error, jax.errors.JaxRuntimeError)
    return several() and (unknown or bool(ENDED.search(str(error))))


def first() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until all processes are there.

    Raises:
      UserError: another one is somewhere else, as where settings or inputs differ.
    """
    if not several():
        return
    try:
        multihost_utils.sync_global_devices(where)
    except AssertionError:
        raise UserError(
            f"process {jax.process_index()} of this job is at the {where}, another one is not: "
            "start all with the same command, settings and inputs"
        ) from None


def any_of(flag: bool) -> bool:
    """Whether it is so in any of the processes, which all ask at the same time."""
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any()) if several() else flag


def of_first(tree: Any) -> Any:
    """NumPy's arrays as the first process has them; the others give some of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


@contextlib.contextmanager
def first_ahead(where: str) -> Iterator[None]:
    """Lets the first process do something before the others, which may find it done."""
    if not first():
        meet(where)
    try:
        yield
    finally:
        if first():
            meet(where)


@contextlib.contextmanager
def own_copy(path: Path) -> Iterator[Path]:
    """The folder that this process writes: the path itself, or a copy of its small files."""
    copied = f"copy of {path}"  # after which the first one may change it
    if first():
        meet(copied)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in path.glob("*.json*"):
            shutil.copy(file, folder)
        meet(copied)
        yield Path(folder)


def left(code: int) -> None:
    """Ends a process that has failed; one that waited for the others would keep all waiting."""
    if code and several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
