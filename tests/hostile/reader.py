"""Reads malformed files, one after the other, and says what each came to; one process a kind.

Called with a folder and lines "kind seed" on standard input. For each it prints a JSON line: the
outcome (accepted, refused, or the traceback), the seconds of the processor,
and the peak of resident memory.
"""

import json
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path

import files

from experiment_runs.errors import UserError


def peak_gb() -> float:
    """The largest resident memory since it was last reset (`VmHWM`), or of a child, in GB."""
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e6


def processor_seconds() -> float:
    """Of this process and its children: as many on a machine that is busy with something else."""
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


for line in sys.stdin:
    kind, seed = line.split()
    folder = Path(sys.argv[1]) / f"{kind}-{seed}"
    files.make(kind, folder, int(seed))
    print(json.dumps({"kind": kind, "seed": seed, "began": True}), flush=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_gb(), processor_seconds()
    message = ""
    try:
        files.read(kind, folder)
        outcome = "accepted"
    except UserError as error:
        outcome, message = "refused", str(error)
    except BaseException:
        outcome, message = "traceback", traceback.format_exc()
    print(json.dumps({
        "kind": kind, "seed": seed, "outcome": outcome, "message": message[-4000:],
        "length": len(message), "seconds": processor_seconds() - began, "peak_gb": peak_gb(),
        "before_gb": before,
    }), flush=True)  # fmt: skip
    shutil.rmtree(folder)
