"""Sides that take turns: each in a process of its own, and none works while another does.

What slows the machine down for a while then hits all sides, though not alike: with OpenMP PyTorch
waits for its slowest thread, so that other jobs cost it more. Measure on a quiet machine.

A side answers with one line of JSON
when it is ready, and with one more for every line of input.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
PEER = PROJECT / ".venv-trl" / "bin" / "python"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
Answer = dict[str, Any]
Measure = Callable[[Answer], float | None]


def options(
    description: str, parts: Iterable[str], sides: Iterable[str]
) -> argparse.ArgumentParser:
    """What every benchmark of a language model lets one choose."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("RLHF_DATA_DIR") or None)
    parser.add_argument("--model", default=os.environ.get("RLHF_MODEL") or SMOLLM2)
    parser.add_argument("--torch-python", type=Path, default=PEER)
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def compare(
    args: argparse.Namespace, turns: Mapping[str, int], report: Callable[..., str], *needs: str
) -> None:
    """Prepares, lets both sides take every part, prints the result and keeps it if asked to.

    Args:
      args: from `options`.
      turns: how many each side gets, by part.
      report: the text of one part, from (part, folder, ready, answers).
      needs: modules without which the peer's environment is of no use.
    """
    require(args.torch_python, needs)
    pythons = {"jax": sys.executable, "torch": str(args.torch_python)}
    with tempfile.TemporaryDirectory() as folder:
        passed = [sys.argv[0], *sys.argv[1:], "--folder", folder]
        prepare = [sys.executable, *passed, "--side", "prepare"]
        if subprocess.run(prepare, env=environment()).returncode:
            sys.exit("prepare: failed; its own message is above")
        head = [circumstances(), Path(folder, "about.txt").read_text()]
        texts = []
        for part in args.parts:
            commands = {
                side: [python, *passed, "--side", side, "--parts", part]
                for side, python in pythons.items()
            }
            ready, answers = take_turns(commands, turns[part])
            texts.append(report(part, Path(folder), ready, answers))
    versions = "; ".join(said["version"] for said in ready.values())
    text = "\n\n".join(["\n".join([*head, f"versions  {versions}"]), *texts])
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


def environment() -> dict[str, str]:
    """For processes that may run on other environments' interpreters."""
    return os.environ | {"PYTHONPATH": str(PROJECT)}


def require(python: Path, modules: Iterable[str]) -> None:
    """Exits with a word on what to do where the peer's environment lacks something."""
    find = (
        "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))"
    )
    hint = "`make .venv-trl/done` makes the peers' environment"
    if not python.exists():
        sys.exit(f"{python}: no such interpreter; {hint}")
    command = [str(python), "-c", find, *modules]
    if lacking := subprocess.run(command, capture_output=True, text=True).stdout.strip():
        sys.exit(f"{python}: lacks {lacking}; {hint}")


def take_turns(
    commands: Mapping[str, Sequence[str]], turns: int
) -> tuple[dict[str, Answer], dict[str, list[Answer]]]:
    """What each side says when it is ready, and its answers of all turns."""
    workers: dict[str, subprocess.Popen] = {}
    ready: dict[str, Answer] = {}
    for side, command in commands.items():
        workers[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(),
        )  # fmt: skip
        ready[side] = heard(side, workers[side])
    answers: dict[str, list[Answer]] = {side: [] for side in workers}
    for _ in range(turns):
        for side, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            answers[side].append(heard(side, worker))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return ready, answers


def heard(side: str, worker: subprocess.Popen) -> Answer:
    """The next answer of a side."""
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"{side}: stopped without an answer; its own message is above")
    print(f"{side}: {line.strip()}", file=sys.stderr)
    return json.loads(line)


def serve(side: Callable[..., tuple[Answer, Iterable[Answer]]], args: argparse.Namespace) -> None:
    """Answers as one side: `side` gets ready and returns (what it says then, its turns)."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print, only answers are heard
        ready, turns = side(args)
        answer(ready)
        for measured in turns:
            answer(measured)


def answer(measured: Answer) -> None:
    """Says what was measured and waits for the next turn; ends the process if there is none."""
    said = json.dumps(measured | {"memory": peak_memory_gb()})
    print(said, file=sys.__stdout__, flush=True)
    if not sys.stdin.readline():
        sys.exit()


def peak_memory_gb() -> float:
    """Most memory that this process has held. Linux passes a parent's on: keep that one small."""
    units = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def matrix_rate(multiply: Callable[[], Any], size: int, times: int = 8) -> float:
    """FLOP/s of a row of products of square matrices; `multiply` does one and waits for it."""
    multiply()
    began = time.perf_counter()
    for _ in range(times):
        multiply()
    return 2 * size**3 * times / (time.perf_counter() - began)


def loaded(name: str):
    """The pretrained model that all sides start from."""
    from rlhf_jax import pretrained

    return pretrained.load(pretrained.find(name), name=name)


def untrained_judge(model):
    """The reward model before training: the pretrained trunk and a random head."""
    from flax import nnx

    from rlhf_jax import judge

    return judge.Judge(*nnx.split(nnx.merge(*judge.initial(model, seed=0))))


def table(answers: Mapping[str, Sequence[Answer]], columns: Mapping[str, Measure]) -> str:
    """Median, lowest and highest of what was measured, and each side's peak memory."""
    lines = [["side", *columns, "peak memory, GB"], ["---"] * (len(columns) + 2)]
    for side, turn in answers.items():
        cells = [spread([value(a) for a in turn]) for value in columns.values()]
        lines.append([side, *cells, f"{turn[-1]['memory']:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratios(answers: Mapping[str, Sequence[Answer]], over: str, under: str, value: Measure) -> str:
    """How one side compares with the other, turn by turn."""
    pairs = zip(answers[over], answers[under], strict=True)
    return f"{over} / {under}: {spread([value(a) / value(b) for a, b in pairs])}"


def spread(values: Sequence[float | None]) -> str:
    """Median, lowest and highest; just the value where they are the same."""
    if None in values:
        return "-"
    shown = [number(f(values)) for f in (statistics.median, min, max)]
    return shown[0] if len(set(shown)) == 1 else "{} ({} to {})".format(*shown)


def number(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def circumstances() -> str:
    """Machine, command and revision, for the top of a result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    describe = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+"]
    revision = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    tunables = os.environ.get("GLIBC_TUNABLES", "none")
    command = " ".join(Path(word).name for word in sys.argv)  # folders concern nobody else
    return (
        f"machine   {os.cpu_count()} cores of {processor()}, {memory:.0f} GB, {platform.system()}, "
        f"load {os.getloadavg()[0]:.1f} at the start\n"
        f"command   {command}, GLIBC_TUNABLES {tunables}\n"
        f"revision  {revision or 'unknown'}"
    )


def processor() -> str:
    """The processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
