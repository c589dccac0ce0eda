"""The protocol on one accelerator, in pieces: `python benchmarks/accelerator.py`.

Checks first that the accelerator computes what a CPU computes, then runs the profile `assignment`:
the reward model beside the second one and DPO, PPO on all weights beside LoRA, the evaluation; and
the DCGAN, plain and with one cure at a time. What is not finished when the time is up goes on with
the next call, from its last checkpoint. --out gets a table of the phases' times, and an archive of
the runs without weights.

Exit code: 0 all is finished, 75 call again, 1 a stage failed (see its log).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
AGAIN = 75  # EX_TEMPFAIL
GRACE_SECONDS = 20  # for a checkpoint that is being written
LANGUAGE = """
import sys
from experiment_runs.compilation import keep_programs
from rlhf_jax import experiment
keep_programs()
print(experiment.from_environment().run(sys.argv[1]).path)
"""
CURES = {
    "gan-label-smoothing": ("--label-smoothing", "0.1"),
    "gan-augmentation": ("--augmentation", "colour", "translation", "cutout"),
    "gan-spectral-norm": ("--spectral-norm",),
}
COMPILED = re.compile(r"Finished XLA compilation of \S+ in ([\d.]+) sec")
KEPT = (".json", ".jsonl", ".npz", ".md")
UNSHARED = "real.npz"  # licences may forbid to pass images on


@dataclasses.dataclass(frozen=True)
class Stage:
    """A process, and the stages that must be finished before it starts."""

    command: tuple[str, ...]
    after: tuple[str, ...] = ()


def protocol(cure_arguments: tuple[str, ...] = ()) -> dict[str, Stage]:
    """All stages by name, in the order in which they start where there is room.

    Args:
      cure_arguments: further options of the DCGAN's cures, for instance fewer epochs.
    """
    parity = (sys.executable, str(PROJECT / "benchmarks" / "parity.py"))
    gan = (sys.executable, "-m", "gan_jax", "train")
    needs = {
        "reward": ("parity",),
        "second_reward": ("parity",),
        "dpo": ("parity",),
        "ppo-full": ("reward",),
        "ppo-lora": ("reward",),
        "evaluate": ("second_reward", "dpo", "ppo-full", "ppo-lora"),
    }
    language = {
        name: Stage((sys.executable, "-c", LANGUAGE, name), after) for name, after in needs.items()
    }
    cures = {name: Stage((*gan, *own, *cure_arguments), ("parity",)) for name, own in CURES.items()}
    return {"parity": Stage(parity), **language, "gan": Stage(gan, ("parity",)), **cures}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=570, help="after which all is stopped")
    parser.add_argument("--stages", nargs="+", help="these alone; what they need must be finished")
    parser.add_argument("--gans", type=int, default=2, help="DCGANs that train beside each other")
    parser.add_argument("--cure-epochs", type=int, help="of a DCGAN with a cure; the profile's")
    parser.add_argument("--out", type=Path, default=PROJECT / "_output" / "accelerator")
    args = parser.parse_args()
    epochs = ("--epochs", str(args.cure_epochs)) if args.cure_epochs else ()
    stages = protocol(epochs)
    if unknown := set(args.stages or ()) - set(stages):
        parser.error(f"--stages {' '.join(unknown)}: unknown; there are {', '.join(stages)}")
    if args.stages:
        stages = {
            name: dataclasses.replace(stage, after=tuple(set(stage.after) & set(args.stages)))
            for name, stage in stages.items()
            if name in args.stages
        }
    environment = circumstances()
    results = Path(environment["RLHF_RESULTS"])
    logs = results / "logs"
    states = run(stages, logs, environment, seconds=args.seconds, gans=args.gans)
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [f"{name:22}{state}" for name, state in states.items()] + ["", *phases(results)]
    )
    (args.out / "phases.txt").write_text(text + "\n")
    print(text, flush=True)
    collect(results, args.out / "runs.tar.gz")
    if "failed" in states.values():
        return 1
    return 0 if set(states.values()) == {"finished"} else AGAIN


def circumstances() -> dict[str, str]:
    """The environment of the stages: several processes share the device, and what one compiles
    is kept for the next call."""
    results = Path(os.environ.get("RLHF_RESULTS") or PROJECT / "results" / "local").resolve()
    given = {
        "RLHF_PROFILE": "assignment",
        "RLHF_CHECKPOINT_SECONDS": "60",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "RLHF_COMPILATION_CACHE": str(results / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # stages share many small programs
        "JAX_LOG_COMPILES": "1",
    }
    return given | os.environ | {"RLHF_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}


def run(
    stages: Mapping[str, Stage],
    logs: Path,
    environment: Mapping[str, str],
    *,
    seconds: float,
    gans: int,
) -> dict[str, str]:
    """Runs every stage as soon as what it needs is finished, until the time is up.

    Args:
      stages: by name.
      logs: folder for what each prints; earlier calls' lines stay.
      environment: of the processes.
      seconds: after which what still runs is asked to end.
      gans: most stages named "gan..." at the same time.

    Returns:
      What became of each stage: "finished", "failed", "stopped" or "waiting".
    """
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    running: dict[str, subprocess.Popen] = {}
    states = dict.fromkeys(stages, "waiting")
    with ended(running):
        while time.monotonic() - began < seconds:
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    states[name] = "failed" if code else "finished"
                    say(f"{name}: {states[name]}", began)
                    del running[name]
            ready = [
                name
                for name, stage in stages.items()
                if states[name] == "waiting"
                and all(states[other] == "finished" for other in stage.after)
            ]
            for name in ready:
                if name.startswith("gan") and sum(map(is_gan, running)) >= gans:
                    continue
                with (logs / f"{name}.log").open("ab") as log:
                    running[name] = subprocess.Popen(
                        stages[name].command, cwd=PROJECT, env=environment,
                        stdout=log, stderr=subprocess.STDOUT,
                    )  # fmt: skip
                states[name] = "stopped"  # unless it is seen to end
                say(f"{name}: started", began)
            if not running:
                break
            time.sleep(0.2)
    return states


def is_gan(name: str) -> bool:
    return name.startswith("gan")


def say(what: str, began: float) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)


@contextlib.contextmanager
def ended(running: Mapping[str, subprocess.Popen]) -> Iterator[None]:
    """No process outlives the block, also when this process is asked to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def phases(results: Path) -> list[str]:
    """A table of what took how long, one line a run; parity and the device's peak above it."""
    path = results / "logs" / "parity.json"
    parity = json.loads(path.read_text()) if path.exists() else {}
    lines = [f"{name}: {value}" for name, value in parity.items()]
    columns = ("steps", "first_seconds", "median_seconds", "all_seconds", "stage_seconds")
    lines += ["", f"{'run':28}{'phase':10}" + "".join(f"{name:>16}" for name in columns)]
    for folder in sorted(path.parent for path in results.glob("*/config.json")):
        rows = read_jsonl(folder / "metrics.jsonl")
        attempts = [row["seconds"] for row in read_jsonl(folder / "times.jsonl")]
        for phase in ("seconds", "seconds_sampling", "seconds_update"):
            taken = [row[phase] for row in rows if phase in row]
            if taken:
                values = (len(taken), taken[0], statistics.median(taken), sum(taken), sum(attempts))
                shown = "".join(f"{value:16.5g}" for value in values)
                lines.append(f"{folder.name:28}{phase.removeprefix('seconds_'):10}{shown}")
        if rows and not any("seconds" in name for name in rows[-1]):
            lines.append(
                f"{folder.name:28}{'updates':10}{rows[-1]['step']:16}{sum(attempts):64.5g}"
            )
    lines += ["", "compiling, seconds"]
    for log in sorted((results / "logs").glob("*.log")):
        taken = [float(value) for value in COMPILED.findall(log.read_text(errors="replace"))]
        lines.append(f"{log.stem:28}{len(taken):4} programs{sum(taken):10.1f}")
    return lines


def read_jsonl(path: Path) -> list[dict]:
    """The whole lines of a file; none when it is missing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def collect(results: Path, archive: Path) -> None:
    """The small files of all runs, those of unfinished ones in a folder of their own, and logs."""
    with tarfile.open(archive, "w:gz") as tar:
        for folder in sorted(path.parent for path in results.glob("*/config.json")):
            place = "" if (folder / "summary.json").exists() else "unfinished/"
            for path in sorted(folder.iterdir()):
                if path.suffix in KEPT and path.name != UNSHARED:
                    tar.add(path, f"{place}{folder.name}/{path.name}")
        for path in sorted((results / "logs").glob("*")):
            tar.add(path, f"logs/{path.name}")


if __name__ == "__main__":
    sys.exit(main())
