"""Malformed files over all readers: each is read or refused in one message, in bounded time and
memory. The seed and the number come from HOSTILE_SEED and HOSTILE_FILES."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("hostile_files", HERE / "files.py")
files = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(files)
PROJECT = HERE.parent.parent
SECONDS, GIGABYTES, CHARACTERS = 10, 1.5, 4000
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
COUNT = int(os.environ.get("HOSTILE_FILES", "60"))


@pytest.mark.hostile
@pytest.mark.parametrize("kind", files.KINDS)
def test_a_malformed_file_is_one_message_in_bounded_time_and_memory(kind, tmp_path):
    asked = [seed for own, seed in files.numbers(COUNT, SEED) if own == kind]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT), "RLHF_DEBUG": "",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(HERE / "reader.py"), str(tmp_path)], cwd=PROJECT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wrong, refused = [], 0
    for seed in asked:
        process.stdin.write(f"{kind} {seed}\n")
        process.stdin.flush()
        process.stdout.readline()  # the file is written
        watch = threading.Timer(6 * SECONDS, process.kill)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        assert line, f"{kind} {seed}: hangs beyond {6 * SECONDS} seconds, or ended the process"
        found = json.loads(line)
        refused += found["outcome"] == "refused"
        if (
            found["outcome"] == "traceback"
            or found["length"] > CHARACTERS
            or found["seconds"] > SECONDS
            or found["peak_gb"] > GIGABYTES
        ):
            wrong.append(found)
    process.stdin.close()
    process.stdout.close()
    process.wait()
    report = "\n\n".join(
        f"{x['kind']} {x['seed']}: {x['outcome']}, {x['seconds']:.1f} s, {x['peak_gb']:.2f} GB, "
        f"{x['length']} characters\n{x['message'][-1500:]}" for x in wrong
    )  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(asked)}\n{report}"
    assert refused >= len(asked) // 3  # or the generator has become harmless
