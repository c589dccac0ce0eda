"""Malformed files over all readers: each is read or refused in one message, in bounded time and
memory. The seed and the number come from HOSTILE_SEED and HOSTILE_FILES."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
SECONDS, GIGABYTES, CHARACTERS = 10, 1.5, 4000
SEED = os.environ.get("HOSTILE_SEED", "1")
COUNT = os.environ.get("HOSTILE_FILES", "60")


@pytest.mark.hostile
@pytest.mark.parametrize("kinds", ["data", "models", "results", "documents"])
def test_a_malformed_file_is_one_message_in_bounded_time_and_memory(kinds, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT), "RLHF_DEBUG": "",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(HERE / "reader.py"), str(tmp_path), kinds, COUNT, SEED], cwd=PROJECT,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    found = []
    while name := process.stdout.readline().strip():  # of a file that is written
        watch = threading.Timer(6 * SECONDS, process.kill)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        assert line, f"{name}: hangs beyond {6 * SECONDS} seconds, or ended the process"
        found.append(json.loads(line))
    process.stdout.close()
    assert process.wait() == 0
    wrong = [
        x for x in found
        if x["outcome"] == "traceback" or x["length"] > CHARACTERS or x["seconds"] > SECONDS
        or x["peak_gb"] > GIGABYTES
    ]  # fmt: skip
    report = "\n\n".join(
        f"{x['kind']} {x['seed']}: {x['outcome']}, {x['seconds']:.1f} s, {x['peak_gb']:.2f} GB, "
        f"{x['length']} characters\n{x['message'][-1500:]}" for x in wrong
    )  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(found)}\n{report}"
    refused = sum(x["outcome"] == "refused" for x in found)
    assert refused >= len(found) // 3  # or the generator has become harmless
