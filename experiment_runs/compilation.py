"""Compiled programs kept between processes, so that only the first run waits for the compiler."""

import contextlib
from pathlib import Path

import filelock
import jax

from experiment_runs import settings
from experiment_runs.files import fingerprint

MOST_GB = 4  # programs that were used longest ago give way


def keep_programs() -> str:
    """Keeps compiled programs where RLHF_COMPILATION_CACHE says, and says where, for the log.

    Each kind of processor has a folder of its own, because a program may hold instructions that
    another one lacks: home directories are shared. The limit makes JAX lock the folder while it
    reads and writes, which several processes need. A folder that JAX was given already
    (JAX_COMPILATION_CACHE_DIR) is left as it is. To be called before anything is compiled.

    Raises:
      UserError: RLHF_COMPILATION_CACHE names what is no folder that can be written.
    """
    if given := jax.config.jax_compilation_cache_dir:
        return f"kept in {given}"
    folder = settings.compilation_cache(machine())
    if folder is None:
        return "not kept"
    remove_torn(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_GB * 10**9)
    return f"kept in {folder}, at most {MOST_GB} GB (RLHF_COMPILATION_CACHE=off: not kept)"


def machine() -> str:
    """A name for what decides which instructions a program may hold."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return fingerprint(jax.devices()[0].device_kind, sorted(set(said)))[:10]


def remove_torn(folder: Path) -> None:
    """Removes the programs that a process was writing when it was killed, unless another one has
    read what there is of them: JAX would store nothing in their place.

    JAX writes when a program was used last after the program itself, under the same lock. Where
    that cannot be had, as in another user's folder, JAX warns of what it cannot read or write.
    """
    lock = filelock.FileLock(folder / ".lockfile", timeout=10)
    with contextlib.suppress(filelock.Timeout, OSError), lock:
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
