"""Where a run came from: code, versions, device, time."""

import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import jax

from experiment_runs.files import fingerprint
from experiment_runs.precision import matmul_precision
from experiment_runs.process import processor
from experiment_runs.settings import LIBRARIES, SOURCES

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

GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set within git's hooks


@functools.cache
def code_fingerprint() -> str:
    """Fingerprint of the libraries' sources, in whatever folders."""
    sources = [path for name in LIBRARIES for path in sorted(SOURCES.glob(f"{name}/**/*.py"))]
    return fingerprint(*sources)


def provenance() -> dict[str, Any]:
    """What a reader needs to trust or repeat a run: code, versions, device, time."""
    device = jax.devices()[0]
    return {
        "git": git_revision(),
        "code": code_fingerprint(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": f"{device.platform}: "
        f"{processor() if device.platform == 'cpu' else device.device_kind}",
        "matmul_precision": matmul_precision(),
        "cores": os.cpu_count(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def git_revision() -> str:
    """Short revision, with "+" when there are uncommitted changes; "unknown" without git.

    A repository around the sources, of which they are a part or in which they are installed, is
    somebody else's and says nothing of them.
    """
    environment = {name: text for name, text in os.environ.items() if name not in GIT_VARIABLES}
    environment["GIT_CEILING_DIRECTORIES"] = str(SOURCES.parent)
    try:
        described = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty=+"],
            cwd=SOURCES, env=environment, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
