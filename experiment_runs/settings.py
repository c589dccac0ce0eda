"""Where sources and results lie, and what the environment asks for.

The command line, the chapters and Quarto agree on what is shown because all of them ask here. The
Makefile sets the variables from its own: `make report PROFILE=tiny` sets RLHF_PROFILE.

    RLHF_PROFILE             how much is trained: tiny, cpu, study or assignment
    RLHF_MODEL               folder or hub id of the model to start from
    RLHF_PRECISION           float32, mixed or bfloat16; by default what the machine is fast in
    RLHF_DATA_DIR            folder with local copies of the data
    RLHF_PREFERENCES         folder, file or hub id of preference pairs, in place of SHP
    RLHF_PROMPTS             folder, file or hub id of prompts, in place of OASST's
    RLHF_STUDENT_ID          its last digit chooses the images of the DCGAN
    RLHF_LAST_NAME           names the files that are handed in
    RLHF_RUN                 a folder in results/: its committed runs are shown, nothing is trained
    RLHF_RESULTS             folder to train into; results/local by default
    RLHF_MESH                devices by axes, data=4,model=2; by default all of them on data
    RLHF_HOSTS               auto, or ADDRESS:PORT/COUNT/NUMBER: this process is one of several that
                             train together
    RLHF_REMAT               1: blocks are computed again for the gradient, which takes less
                             memory and more time
    RLHF_CHECKPOINT_SECONDS  seconds between the checkpoints of a training; 180 by default
    RLHF_HUB_SECONDS         seconds without a byte that end a download; 30 by default
    RLHF_COMPILATION_CACHE   folder for compiled programs, or off; by default in the user's cache
    RLHF_DEBUG               1: the traceback of an error as well as its message
    RLHF_LOG_TO              tensorboard or trackio: where every step is logged besides
    RLHF_PROGRESS            1: progress bars even where no terminal shows them
    RLHF_FORCE               1: hand in what would not count
    RLHF_SUBMISSION          set while the report is handed in: the student's own run alone is shown
"""

import difflib
import os
import re
import tempfile
from pathlib import Path

import jax

from experiment_runs.errors import UserError, first_line

SOURCES = Path(__file__).resolve().parent.parent  # a checkout, or site-packages
# An installed package writes into the working directory, never beside itself.
PROJECT = SOURCES if (SOURCES / "report.qmd").is_file() else Path.cwd()
RESULTS = PROJECT / "results"
LOCAL = RESULTS / "local"
LIBRARIES = ("experiment_runs", "rlhf_jax", "gan_jax")  # whose code makes a run's numbers
PRECISIONS = ("auto", "float32", "mixed", "bfloat16")
SHOWN = (
    "RLHF_PROFILE", "RLHF_MODEL", "RLHF_PRECISION", "RLHF_DATA_DIR", "RLHF_PREFERENCES",
    "RLHF_PROMPTS", "RLHF_STUDENT_ID", "RLHF_RUN", "RLHF_RESULTS", "RLHF_SUBMISSION",
)  # fmt: skip


def data_dir() -> Path | None:
    """The folder of local data that RLHF_DATA_DIR names, if it names one.

    Raises:
      UserError: there is no such folder.
    """
    named = os.environ.get("RLHF_DATA_DIR")
    return folder_of_data(Path(named), f"DATA_DIR={named}") if named else None


def folder_of_data(path: Path, asked: str) -> Path:
    """The path, which must be a folder; `asked` is how the user named it."""
    if not path.is_dir():
        raise UserError(f"{asked}: no such folder; see README.md for its layout")
    return path


def checkpoint_seconds() -> float:
    """Seconds between the checkpoints of a training; see `seconds`."""
    return seconds("RLHF_CHECKPOINT_SECONDS", os.environ.get("RLHF_CHECKPOINT_SECONDS") or "180")


def hub_seconds() -> float:
    """Seconds without a byte after which a download is given up; see `seconds`."""
    return seconds("RLHF_HUB_SECONDS", os.environ.get("RLHF_HUB_SECONDS") or "30")


def seconds(name: str, named: str) -> float:
    """The seconds that a variable names.

    Raises:
      UserError: not a number of seconds.
    """
    try:
        found = float(named)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UserError(f"{name}={named:.80}: write a number of seconds, 0 or more")
    return found


def check() -> None:
    """Rejects nonsense in variables that are read late, before anything is trained, and variables
    whose names are nearly those of the known ones."""
    known = re.findall(r"RLHF_\w+", __doc__)
    for name in sorted(name for name in os.environ if name.startswith("RLHF_")):
        if name not in known and (meant := difflib.get_close_matches(name, known, 1, cutoff=0.9)):
            raise UserError(f"{name}: unknown; did you mean {meant[0]}?")
    for read in (checkpoint_seconds, hub_seconds, log_to, committed):
        read()


def is_set(name: str) -> bool:
    """Whether a variable holds a text other than 0, no and false."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "no", "false")


def profile() -> str:
    """The profile that RLHF_PROFILE names, else the machine's own."""
    machine = "cpu" if backend() == "cpu" else "assignment"
    return os.environ.get("RLHF_PROFILE") or machine


def backend() -> str:
    """The kind of JAX's devices.

    Raises:
      UserError: there is none of the kind that JAX_PLATFORMS names.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX_PLATFORMS={jax_platforms()}: JAX finds no such device ({first_line(error)}); "
            "write cpu, or nothing, and see to the driver and to JAX's package for it"
        ) from error


def hand_in(profile: str) -> None:
    """Lets this process and the kernels that it starts show a submission of this profile."""
    os.environ |= {"RLHF_PROFILE": profile, "RLHF_SUBMISSION": "1"}


def mesh() -> str:
    """The devices by axes as RLHF_MESH has them, or ""; see `devices.mesh`."""
    return os.environ.get("RLHF_MESH", "").strip()


def hosts() -> str:
    """How this process finds the others of its job, or ""; see `hosts.join`."""
    return os.environ.get("RLHF_HOSTS", "").strip()


def rematerialized() -> bool:
    """Whether blocks are computed again for the gradient."""
    return is_set("RLHF_REMAT")


def divide(mesh: str, remat: bool) -> None:
    """Lets this process, and those that it starts, train on these devices in this way."""
    os.environ |= {"RLHF_MESH": mesh, "RLHF_REMAT": "1" if remat else ""}


def model() -> str | None:
    """The model that RLHF_MODEL names, if it names one."""
    return os.environ.get("RLHF_MODEL") or None


def compilation_cache(machine: str) -> Path | None:
    """The folder for what is compiled for a kind of machine, made; None where nothing is kept.

    Raises:
      UserError: RLHF_COMPILATION_CACHE names a file, or a folder that cannot be written.
    """
    named = os.environ.get("RLHF_COMPILATION_CACHE", "").strip()
    if named.lower() == "off" or (named and not is_set("RLHF_COMPILATION_CACHE")):
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(named or f"{caches}/rlhf-jax/compiled")
    if folder.startswith("~"):  # this user has no home
        return None
    folder = Path(folder) / machine
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if not named:  # a home that cannot be written
            return None
        raise UserError(
            f"RLHF_COMPILATION_CACHE={named}: nothing can be kept there ({error.strerror}); "
            "name another folder, or off"
        ) from None
    return folder


def precision() -> str:
    """The precision that RLHF_PRECISION names, or "auto".

    Raises:
      UserError: it is none that is known.
    """
    named = os.environ.get("RLHF_PRECISION") or "auto"
    if named not in PRECISIONS:
        raise UserError(f"RLHF_PRECISION={named}: unknown; say one of {', '.join(PRECISIONS)}")
    return named


def preferences() -> str:
    """The folder, file or hub id of preference pairs that is named, or ""."""
    return os.environ.get("RLHF_PREFERENCES", "").strip()


def prompts() -> str:
    """The folder, file or hub id of prompts that is named, or ""."""
    return os.environ.get("RLHF_PROMPTS", "").strip()


def student_id() -> str | None:
    """The student ID, if one is given."""
    return os.environ.get("RLHF_STUDENT_ID", "").strip() or None


def last_name() -> str | None:
    """The last name of who hands in, if one is given."""
    return os.environ.get("RLHF_LAST_NAME", "").strip() or None


def results() -> Path:
    """The folder that runs are trained into."""
    return Path(os.environ.get("RLHF_RESULTS") or LOCAL).expanduser()


def committed() -> Path | None:
    """The folder of committed runs that RLHF_RUN names, if it names one.

    Raises:
      UserError: there is no such folder.
    """
    named = os.environ.get("RLHF_RUN")
    if not named:
        return None
    folder = RESULTS / named
    if Path(named).name != named or named == ".." or not folder.is_dir():
        known = ", ".join(sorted(path.name for path in folder.parent.glob("*/")))
        raise UserError(f"RUN={named}: no folder results/{named}; there are: {known or 'none'}")
    return folder


def submission() -> bool:
    """Whether the report is being handed in, so that it must show one student's run alone."""
    return is_set("RLHF_SUBMISSION")


def forced() -> bool:
    """Whether to hand in what would not count."""
    return is_set("RLHF_FORCE")


def debugging() -> bool:
    """Whether the tracebacks of errors are shown as well as their messages."""
    return is_set("RLHF_DEBUG")


def log_to() -> str | None:
    """The tracker that RLHF_LOG_TO names, if it names one.

    Raises:
      UserError: it is none that is known.
    """
    named = os.environ.get("RLHF_LOG_TO") or None
    if named not in (None, "tensorboard", "trackio"):
        raise UserError(f"RLHF_LOG_TO={named}: unknown; say tensorboard or trackio, or nothing")
    return named


def progress_wanted() -> bool:
    """Whether progress is shown even where no terminal is."""
    return is_set("RLHF_PROGRESS")


def asked() -> dict[str, str]:
    """The variables that decide which runs are shown; what is not asked for is empty."""
    values = {name: os.environ.get(name, "") for name in SHOWN}
    return values | {"RLHF_PROFILE": profile()}


def jax_platforms() -> str:
    """The platforms that JAX was told to use, "" where it was told nothing."""
    return os.environ.get("JAX_PLATFORMS", "")
