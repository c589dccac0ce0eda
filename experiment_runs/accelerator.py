"""The accelerator of this machine: what it computes in, and whether it is used at all."""

import subprocess
from pathlib import Path

import jax

from experiment_runs import settings

DEVICE = Path("/dev/nvidia0")  # there wherever a process may use an NVIDIA card, WSL apart
ASK = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
CUDA13 = 580  # the driver's version from which on CUDA 13 runs


def has_bfloat16(platform: str, capability: str = "") -> bool:
    """Whether an accelerator multiplies bfloat16 itself: NVIDIA's from compute capability 8.0 on.

    Older cards (T4, V100, P100) compute in float32: float16, in which they are fast, has too small
    a range for gradients. TPUs have it, and so do the AMD cards that JAX supports. Processors are
    another matter.

    Args:
      platform: of a JAX device.
      capability: its compute capability, "" where it has none.
    """
    major = capability.partition(".")[0]
    return platform != "cpu" and (not major.isdecimal() or int(major) >= 8)


def multiplies_bfloat16() -> bool:
    """Whether the accelerator that JAX uses does."""
    device = jax.devices()[0]
    return has_bfloat16(device.platform, str(getattr(device, "compute_capability", "")))


def idle_gpu() -> str | None:
    """A warning that names the NVIDIA card which JAX does not use, and what installs its JAX."""
    if jax.default_backend() != "cpu" or settings.jax_platforms():
        return None
    try:
        asked = subprocess.run(ASK, capture_output=True, text=True, timeout=20)
        names = asked.stdout.splitlines() if asked.returncode == 0 else []
    except (OSError, subprocess.SubprocessError):
        names = []
    if not names and not DEVICE.exists():
        return None
    name, _, driver = (names or ["an NVIDIA card"])[0].partition(", ")
    major = driver.partition(".")[0]
    cuda = "cuda12" if major.isdecimal() and int(major) < CUDA13 else "cuda13"
    return (
        f"warning: this machine has {name}, but JAX computes on the CPU; "
        f'`make report GPU={cuda}` or `pip install "jax[{cuda}]=={jax.__version__}"` installs what '
        f"it needs{'' if driver else ' (cuda12 with drivers older than 580)'}"
    )
