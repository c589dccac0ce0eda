"""Reads malformed files, one after the other, and says what each came to.

Called with a folder, the name of a process in `kinds.KINDS`, the number of files of all processes
together, and a seed. For each file it prints a line when it is written, and then a JSON line: the
outcome (accepted, refused, or the traceback), the seconds of the processor, and the peak of
resident memory.
"""

import json
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path

from kinds import KINDS, numbers

from experiment_runs.errors import UserError


def peak_gb() -> float:
    """The largest resident memory since it was last reset (`VmHWM`), or of a child, in GB."""
    status = Path("/proc/self/status").read_text()
    own = int(status.split("VmHWM:")[1].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e6


def processor_seconds() -> float:
    """Of this process and its children: as many on a machine that is busy with something else."""
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


root, process, count, seed = sys.argv[1:]
for kind, number in numbers(process, int(count), int(seed)):
    folder = Path(root) / f"{kind}-{number}"
    folder.mkdir()
    KINDS[process][kind].make(folder, random.Random(f"{kind} {number}"))
    print(f"{kind} {number}", flush=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_gb(), processor_seconds()
    message = ""
    try:
        KINDS[process][kind].read(folder)
        outcome = "accepted"
    except UserError as error:
        outcome, message = "refused", str(error)
    except BaseException:
        outcome, message = "traceback", traceback.format_exc()
    print(json.dumps({
        "kind": kind, "seed": number, "outcome": outcome, "message": message[-4000:],
        "length": len(message), "seconds": processor_seconds() - began, "peak_gb": peak_gb(),
        "before_gb": before,
    }), flush=True)  # fmt: skip
    shutil.rmtree(folder)
