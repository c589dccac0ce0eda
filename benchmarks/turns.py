"""Sides that take turns: every turn is a process of its own, and no two are alive at once.

What slows the machine down for a while then hits all sides, though not alike: with OpenMP PyTorch
waits for its slowest thread, so that other jobs cost it more. Measure on a quiet machine.

A turn warms up and measures right after that: in a process that waited for its turn, the first
step was found to take twice as long where a virtual machine gives memory back to its host.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
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
MATRIX = 2048  # rows and columns of the matrices whose product gives the machine's peak
# Ours as it is chosen on a processor that multiplies bfloat16, and as on every other one; the peer
# under autocast, or with weights in bfloat16 where it generates, and in float32.
SIDES = ("jax mixed", "jax float32", "torch bfloat16", "torch float32")
# The peer's by torch.compile, of the steps that one compiles; it asks for a compiler of C++.
COMPILED = ("torch bfloat16 compiled", "torch float32 compiled")
Answer = dict[str, Any]
Measure = Callable[[Answer], float | None]


def options(
    description: str, parts: Iterable[str], sides: Sequence[str] = SIDES
) -> argparse.ArgumentParser:
    """What every benchmark of a language model lets one choose."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("RLHF_DATA_DIR") or None)
    parser.add_argument("--model", default=os.environ.get("RLHF_MODEL") or SMOLLM2)
    parser.add_argument("--torch-python", type=Path, default=PEER)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    taken(parser, sides)
    return parser


def taken(parser: argparse.ArgumentParser, sides: Sequence[str]) -> None:
    """Which sides take how many turns, which one a process takes, and where the result goes."""
    parser.add_argument("--sides", nargs="+", choices=sides, default=able(sides))
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    parser.add_argument("--rows", type=Path, help="keep what each side did in this file, as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)


def able(sides: Iterable[str]) -> list[str]:
    """Those that run on this machine."""
    compiler = any(map(shutil.which, ("g++", "clang++")))
    return [side for side in sides if compiler or side not in COMPILED]


def precision(args: argparse.Namespace) -> str:
    """The precision of the side whose turn it is."""
    return args.side.split()[1]


def compare(
    args: argparse.Namespace,
    turns: Mapping[str, int],
    report: Callable[..., tuple[str, dict[str, Measure]]],
    *needs: str,
) -> None:
    """Prepares, lets all sides take every part, prints the result and keeps it if asked to.

    Args:
      args: from `options`.
      turns: how many each side gets, by part.
      report: text and speeds of one part, from (part, folder, answers).
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
        texts, rows = [], []
        for part in args.parts:
            commands = {
                side: [pythons[side.split()[0]], *passed, "--side", side, "--parts", part]
                for side in args.sides
            }
            answers = take_turns(commands, turns[part])
            text, speeds = report(part, Path(folder), answers)
            texts.append(f"{text}\n\n{over_faster(answers, speeds)}")
            rows += summary(answers, speeds)
    head.append(f"versions  {versions(answers)}")
    keep("\n\n".join(["\n".join(head), *texts]), args.output)
    keep_rows(rows, args.rows)


def over_faster(answers: Mapping[str, Sequence[Answer]], speeds: Mapping[str, Measure]) -> str:
    """How our sides compare with the peer's faster one, turn by turn."""
    lines = []
    for what, speed in speeds.items():
        medians = {
            side: statistics.median(map(speed, turn))
            for side, turn in answers.items()
            if side.startswith("torch")
        }
        if medians:
            faster = max(medians, key=medians.__getitem__)
            ours = [side for side in answers if side.startswith("jax")]
            lines += [f"{what}: {ratios(answers, side, faster, speed)}" for side in ours]
    return "\n".join(lines)


def summary(
    answers: Mapping[str, Sequence[Answer]], speeds: Mapping[str, Measure]
) -> list[dict[str, Any]]:
    """A row for each speed: what every side reached in its turns, and the memory that it took."""
    return [
        {
            "work": what,
            "speeds": {side: [speed(answer) for answer in turn] for side, turn in answers.items()},
            "memory": {side: memory(turn) for side, turn in answers.items()},
        }
        for what, speed in speeds.items()
    ]


def keep_rows(rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Keeps rows, where that is asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=1) + "\n")


def versions(answers: Mapping[str, Sequence[Answer]]) -> str:
    """What the sides are made of."""
    return "; ".join(dict.fromkeys(turn[0]["version"] for turn in answers.values()))


def keep(text: str, output: Path | None) -> None:
    """Prints a result, and keeps it where that is asked for."""
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


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


def take_turns(commands: Mapping[str, Sequence[str]], turns: int) -> dict[str, list[Answer]]:
    """What each side measured in all its turns, of which the first compiles the programs."""
    answers: dict[str, list[Answer]] = {side: [] for side in commands}
    with tempfile.TemporaryDirectory() as compiled:
        caches = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        shared = environment() | dict.fromkeys(caches, compiled)
        for turn in range(turns):
            for side, command in commands.items():
                words = [*command, "--turn", str(turn)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=shared)
                if done.returncode or not done.stdout:
                    sys.exit(f"{side}: stopped without an answer; its own message is above")
                print(f"{side}: {done.stdout.strip()}", file=sys.stderr)
                answers[side].append(json.loads(done.stdout))
    return answers


def take(side: Callable[[argparse.Namespace], Answer], args: argparse.Namespace) -> None:
    """Takes one turn and says what it measured, as one line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print, only the answer is heard
        measured = side(args)
    print(json.dumps({"memory": peak_memory_gb()} | measured), flush=True)


def peak_memory_gb() -> float:
    """Most memory that this process has held. Linux passes a parent's on: keep that one small."""
    units = 1e9 if sys.platform == "darwin" else 1e6  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def matrix_rate(multiply: Callable[[], Any], times: int = 8) -> float:
    """FLOP/s of products of two matrices of MATRIX; `multiply` does one and waits for it."""
    multiply()
    began = time.perf_counter()
    for _ in range(times):
        multiply()
    return 2 * MATRIX**3 * times / (time.perf_counter() - began)


def jax_matrix_rate(precision: str) -> float:
    """The same with JAX, of operands as they are in a precision, with a result in float32."""
    import jax

    from experiment_runs.products import product

    one = jax.numpy.ones((MATRIX, MATRIX), "float32" if precision == "float32" else "bfloat16")
    multiply = jax.jit(lambda a, b: product("ab,bc->ac", a, b))
    return matrix_rate(lambda: jax.block_until_ready(multiply(one, one)))


def loaded(args: argparse.Namespace):
    """The pretrained model that all sides start from, in the side's precision."""
    from rlhf_jax.pretrained import hub, loading

    chosen = "float32" if args.side == "prepare" else precision(args)
    return loading.load(hub.find(args.model), name=args.model, dtype=chosen)


def untrained_reward_model(model):
    """The reward model before training: the pretrained trunk and a random head."""
    from flax import nnx

    from rlhf_jax.reward_model import model as reward_models

    return reward_models.FrozenRewardModel(
        *nnx.split(nnx.merge(*reward_models.initial(model, seed=0)))
    )


def table(answers: Mapping[str, Sequence[Answer]], columns: Mapping[str, Measure]) -> str:
    """Median, lowest and highest of what was measured, and each side's peak memory."""
    lines = [["side", *columns, "peak memory, GB"], ["---"] * (len(columns) + 2)]
    for side, turn in answers.items():
        cells = [spread([value(a) for a in turn]) for value in columns.values()]
        lines.append([side, *cells, f"{memory(turn):.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory(turn: Sequence[Answer]) -> float:
    """The most that a side held in any of its turns, in GB."""
    return max(answer["memory"] for answer in turn)


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
    tunables = os.environ.get("GLIBC_TUNABLES", "none")
    return (
        f"machine   {os.cpu_count()} cores of {processor()}, {memory:.0f} GB, {platform.system()}, "
        f"load {os.getloadavg()[0]:.1f} at the start\n"
        f"{command(sys.argv)}, GLIBC_TUNABLES {tunables}\n"
        f"revision  {revision()}"
    )


def command(words: Iterable[Any]) -> str:
    """A command; folders concern nobody else."""
    return f"command   {' '.join(Path(word).name for word in words)}"


def revision() -> str:
    """Of this project, with a plus where files differ from it."""
    describe = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+"]
    told = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return told or "unknown"


def processor() -> str:
    """The processor's name as the system tells it, on Linux with family and what it is fast in."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        told = {name.strip(): value.strip() for name, _, value in lines}
        if "model name" in told:
            flags = told.get("flags", "").split()
            known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
            has = ", ".join(name for name in known if name in flags)
            return f"{told['model name']} (family {told.get('cpu family', '?')}; {has})"
    return platform.processor() or platform.machine()
