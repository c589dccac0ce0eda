"""All benchmarks in one table: `python benchmarks/bench.py`, or `--quick` for what matters most.

Ours in mixed precision and in float32, PyTorch under bfloat16 autocast and in float32, its steps
also compiled, in turns. A ratio is the median, over the turns, of ours by the peer's fastest side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_ppo
import bench_reward
import turns

SIDES = turns.SIDES + turns.COMPILED
SCRIPTS = {  # and the sides that each has
    "bench_reward": SIDES,
    "bench_ppo": turns.SIDES,
    "bench_gan": SIDES,
}
PARTS_OF = {"bench_reward": bench_reward.PARTS, "bench_ppo": bench_ppo.PARTS}
PARTS = [part for parts in PARTS_OF.values() for part in parts]
# What each script is given for a look of some minutes: fewer turns, shorter responses.
QUICK = {
    "bench_reward": ["--parts", "step", "--turns", "2"],
    "bench_ppo": ["--parts", "generation", "--turns", "1", "--generation", "64", "64", "32"],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="reward step, generation")
    options.add_argument("--torch-python", type=Path, default=turns.PEER)
    options.add_argument("--data-dir", type=Path)
    options.add_argument("--output", type=Path, help="keep the table in this file")
    options.add_argument("--folder", type=Path, help="of an earlier call of this revision")
    options.add_argument("--sides", nargs="+", choices=SIDES, default=turns.able(SIDES))
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, help="of reward model and PPO; else all"
    )
    options.add_argument("--turns", type=int, help="of each side; else what the benchmark takes")
    args = options.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bench-"))
    print(f"`--folder {folder}` goes on where this stops", file=sys.stderr)
    rows, texts = [], []
    for script, own in (QUICK if args.quick else dict.fromkeys(SCRIPTS, [])).items():
        output, kept = folder / f"{script}.txt", folder / f"{script}.json"
        if not (sides := [side for side in args.sides if side in SCRIPTS[script]]):
            continue
        own = [*own, "--output", output, "--rows", kept, "--torch-python", args.torch_python]
        own += ["--sides", *sides]
        own += ["--turns", str(args.turns)] if args.turns else []
        if args.parts and script in PARTS_OF:
            if not (parts := [part for part in args.parts if part in PARTS_OF[script]]):
                continue
            own += ["--parts", *parts]
        if args.data_dir and script != "bench_gan":
            own += ["--data-dir", args.data_dir]
        words = [Path(__file__).with_name(f"{script}.py"), *own]
        of = f"{turns.command(words)},", f"revision  {turns.revision()}\n"
        if not kept.exists() or not all(line in output.read_text() for line in of):
            subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
        rows += json.loads(kept.read_text())
        texts.append(f"## {script}\n\n{detailed(output.read_text())}")
    lines = [f"* {line}" for line in turns.circumstances().splitlines()]
    parts = ["# Speed", "\n".join(lines), table(rows), *texts]
    turns.keep("\n\n".join(parts), args.output)


def table(rows: list[dict]) -> str:
    """One line a kind of work: what each side reached, and ours by the peer's faster side."""
    lines = [["work", *SIDES, "mixed, times", "float32, times", "memory, times less"]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in rows:
        speeds, memory = row["speeds"], row["memory"]
        cells = [turns.spread(speeds[side]) if side in speeds else "-" for side in SIDES]
        torch = [side for side in speeds if side.startswith("torch")]
        faster = max(torch, key=lambda side: statistics.median(speeds[side]), default=None)
        for side in turns.SIDES[:2]:
            both = faster is not None and side in speeds
            pairs = zip(speeds[side], speeds[faster], strict=True) if both else ()
            ratios = [ours / theirs for ours, theirs in pairs]
            cells.append(turns.spread(ratios) if ratios else "-")
        ours = next((memory[side] for side in turns.SIDES[:2] if side in memory), None)
        cells.append(turns.number(memory[faster] / ours) if ours and faster else "-")
        lines.append([row["work"], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def detailed(text: str) -> str:
    """A script's text, whose headings go one level down and whose head is a block."""
    head, _, rest = text.partition("\n\n")
    return f"```\n{head}\n```\n\n{rest}".replace("\n## ", "\n### ").rstrip()


if __name__ == "__main__":
    main()
