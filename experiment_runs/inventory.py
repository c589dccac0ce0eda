"""Runs that are there: what each is, how it was made, the disk it takes, two side by side.

The tables fit a terminal of 60 columns. A run that cannot be read is listed as such, so that it can
be removed.
"""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment_runs.errors import UserError
from experiment_runs.files import read_jsonl
from experiment_runs.lock import locked
from experiment_runs.provenance import code_fingerprint
from experiment_runs.run import Run

WIDTH = 60  # columns
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
COUNTS = ("parameters", "trained_parameters")  # by part of a model; their sum says enough
MADE = ("started", "git", "format", "numerics", "device", "cores", "python", "packages")
NAME, VALUE = 25, 16  # columns of a table of two runs: a name, a gap, two values with a gap


def runs_in(folder: Path) -> list[Run]:
    """The runs in a folder, by name.

    Raises:
      UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds runs")
    return [Run(path.parent) for path in sorted(folder.glob("*/config.json"))]


def find(stage: str, root: Path) -> Run:
    """The finished run of `stage` in a folder of committed runs, e.g. results/reference.

    Raises:
      UserError: there is none, or no such folder.
    """
    for run in runs_in(Path(root)):
        if run.stage == stage and run.finished:
            return run
    raise UserError(f"{root}: no finished run of stage '{stage}'; available: {available(root)}")


def run_of(path: Path, stage: str) -> Run:
    """The finished run in a directory, which must be of a stage.

    Raises:
      UserError: it is not.
    """
    run = Run(path)
    if run.stage != stage:
        raise UserError(f"{path}: a run of stage {run.stage!r}; name one of {stage!r}")
    run.require_finished()
    return run


def available(root: Path) -> str:
    """The stages that have a run in `root`, for messages."""
    return ", ".join(sorted(p.parent.name for p in Path(root).glob("*/config.json"))) or "none"


def code_since(run: Run) -> str:
    """What has become of the libraries' sources since they made a run, in words.

    "the same"; "changed", with the same results; or which numbers are older, with other results.
    """
    return run.older or ("the same" if run.record.get("code") == code_fingerprint() else "changed")


def disk_bytes(path: Path) -> int:
    """Sizes of all files below a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def in_units(count: int) -> str:
    """A number of bytes in a form that is at most nine characters long."""
    unit, size = next((unit, size) for unit, size in UNITS.items() if count >= size or unit == "kB")
    return f"{count / size:,.1f} {unit}"


def state(run: Run) -> str:
    """ "finished", "cut off", "older" (other numbers than the present code's) or "broken"."""
    try:
        if run.older:
            return "older"
        return "finished" if run.finished else "cut off"
    except (UserError, AttributeError, TypeError):
        return "broken"


def listing(folder: Path) -> str:
    """The runs in a folder as a table: name, day, disk, state."""
    runs = runs_in(folder)
    if not runs:
        return f"{folder}: no runs"
    lines, total = [str(folder), f"{'run':31}{'made':11}{'disk':>9} state"], 0
    for run in runs:
        size, now = disk_bytes(run.path), state(run)
        total += size
        made = "" if now == "broken" else str(run.record.get("started", ""))[:10]
        lines.append(f"{cut(run.path.name, 30):31}{made:11}{in_units(size):>9} {now}")
    lines.append(f"{len(runs)} runs, {in_units(total)}")
    return "\n".join(lines)


def training_seconds(run: Run) -> float:
    """Of the attempts that ended well."""
    return sum(row["seconds"] for row in read_jsonl(run.path / "times.jsonl", seconds=float))


def description(run: Run) -> str:
    """How a run was made, what it found, and the disk that it takes."""
    weights = disk_bytes(run.checkpoints) if run.checkpoints.is_dir() else 0
    first = {
        "folder": run.path, "stage": run.stage, "state": state(run),
        "disk": f"{in_units(disk_bytes(run.path))}, weights {in_units(weights)}",
        "seconds": round(training_seconds(run)),
    }  # fmt: skip
    own = parts(run)
    own["made"]["code since"] = code_since(run)
    lines = []
    for title, values in {"": first, **own}.items():
        lines += [f"\n{title}"] if title and values else []
        for name, value in values.items():
            lines += textwrap.wrap(
                f"{name}: {shown(value)}",
                WIDTH,
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines)


def parts(run: Run) -> dict[str, dict[str, Any]]:
    """How a run was made, of what and with which settings, and what it found."""
    return {
        "made": flat({name: run.record.get(name) for name in MADE}),
        "of": flat({**run.about, "fingerprint": run.record["inputs"]}),
        "configuration": flat(run.config),
        "results": flat(run.summary) if run.finished else {},
    }


def comparison(one: Run, other: Run) -> str:
    """What differs between two runs in how they were made, and their results side by side."""
    lines = [f"A  {one.path}", f"B  {other.path}", row("", "A", "B")]
    sides = []
    for run in (one, other):
        own = parts(run)
        own["made"] = {"stage": run.stage, "state": state(run), **own["made"]}
        sides.append(own)
    for title in sides[0]:
        a, b = (side[title] for side in sides)
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        lines.append(f"\n{title}: {'what differs' if names else 'the same'}")
        lines += [row(name, shown(a.get(name)), shown(b.get(name))) for name in names]
    return "\n".join(lines)


def row(name: str, a: str, b: str) -> str:
    """A name and two values; a long name has a line for itself."""
    first = f"{name:{NAME}} " if len(name) <= NAME else f"{cut(name, WIDTH)}\n{'':{NAME}} "
    return f"{first}{cut(a, VALUE):{VALUE}}  {cut(b, VALUE)}".rstrip()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values with the dotted names of where they are; rows of tables are left out.

    An estimate with its interval is one value.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        numbers = isinstance(value, Mapping) and all(
            x is None or isinstance(x, int | float) for x in value.values()
        )
        if numbers and {"value", "low", "high"} <= set(value):
            found[prefix + name] = (value["value"], value["low"], value["high"])
        elif numbers and name in COUNTS:
            found[prefix + name] = sum(x or 0 for x in value.values())
        elif isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], dict | list)):
            found[prefix + name] = value
    return found


def shown(value: Any) -> str:
    """A value as text: numbers to three digits, an estimate as "0.7 [0.6, 0.8]"."""
    if isinstance(value, tuple):
        middle, low, high = (f"{x:.2f}" if x is not None else "?" for x in value)
        return f"{middle} [{low},{high}]"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return "-" if value is None else str(value)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def made_from(run: Run) -> Iterator[Run]:
    """The runs beside a run that were made from it."""
    for other in runs_in(run.path.parent):
        if state(other) != "broken" and run.identity in other.record["inputs"].values():
            yield other


def remove(paths: Sequence[Path], *, yes: bool = False) -> int:
    """Removes runs for good, after asking; returns how many.

    Args:
      paths: directories of runs.
      yes: do not ask.

    Raises:
      UserError: one of them is not a run; nothing is removed then.
    """
    runs = [Run(path) for path in paths]
    for run in runs:
        if run.path.is_symlink():
            raise UserError(f"{run.path}: a link; name the folder that it leads to")
    for run in runs:
        print(f"{run.path}: {state(run)}, {in_units(disk_bytes(run.path))}")
        if state(run) != "broken" and (names := kept_dependents(run, runs)):
            print(textwrap.fill(f"made from it: {', '.join(names)}", WIDTH, initial_indent="  "))
    if not yes and not confirmed(f"Remove {len(runs)} for good? [y/N] "):
        print("nothing removed")
        return 0
    for run in runs:
        with locked(run.path / "lock", wait=False):  # nobody trains it
            shutil.rmtree(run.path)
    print(f"removed {len(runs)}")
    return len(runs)


def kept_dependents(run: Run, removed: Iterable[Run]) -> list[str]:
    """Names of the runs that were made from a run and that stay."""
    gone = {other.path.resolve() for other in removed}
    return [other.path.name for other in made_from(run) if other.path.resolve() not in gone]


def confirmed(question: str) -> bool:
    """Whether somebody says yes; no where nobody can answer."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
