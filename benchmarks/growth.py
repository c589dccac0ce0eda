"""How the time of a training step and of sampling grows: `python benchmarks/growth.py`.

One size at a time is changed, the others stay: rows, tokens, and the width of the model. A power of
the size is fitted to the medians; an exponent of 1 is proportional cost. Writes a table and a plot,
results/measured/growth.txt and .png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import turns

BASE = {"rows": 8, "tokens": 256, "heads": 9}  # nine heads of 64 are the 135M of SmolLM2
AXES = {"rows": (2, 4, 8, 16), "tokens": (64, 128, 256, 512), "heads": (3, 6, 9, 12)}
WORKS = {"training": "a training step of the reward model", "sampling": "sampling, tokens a row"}
TIMES = 3
TICKS = (1, 2, 5, 10, 20, 50, 100)  # seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--output", type=Path, default=turns.PROJECT / "results/measured/growth.txt"
    )
    options.add_argument("--point", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.point:
        print(json.dumps(measured(**json.loads(args.point))))
        return
    lines, found = [turns.circumstances()], {}
    for work, title in WORKS.items():
        lines += [f"\n## {title}; 8 rows, 256 tokens, 9 heads but for what is said", ""]
        for axis, values in AXES.items():
            answers = [point(work, **BASE | {axis: value}) for value in values]
            sizes = [answer["millions"] if axis == "heads" else value
                     for answer, value in zip(answers, values, strict=True)]  # fmt: skip
            medians = [statistics.median(answer["seconds"]) for answer in answers]
            exponent = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
            name = "millions of weights in the blocks" if axis == "heads" else axis
            found[work, name] = sizes, medians, exponent
            shown = ", ".join(
                f"{size:.0f}: {turns.spread(answer['seconds'])} s"
                for size, answer in zip(sizes, answers, strict=True)
            )
            lines.append(f"{name}: {shown}; exponent {exponent:.2f}")
    turns.keep("\n".join(lines), args.output)
    plot(found, args.output.with_suffix(".png"))


def point(work: str, **sizes) -> dict:
    """Seconds of a few calls, in a process of their own."""
    words = [sys.executable, __file__, "--point", json.dumps({"work": work, **sizes})]
    told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(work, sizes, told.strip(), file=sys.stderr)
    return json.loads(told)


def measured(work: str, rows: int, tokens: int, heads: int) -> dict:
    """Seconds of `TIMES` calls after the one that compiles, and the blocks' weights in millions."""
    import jax
    import programs

    from experiment_runs.precision import resolved
    from rlhf_jax.config import PPOConfig, RewardConfig

    width = 64 * heads
    programs.MODELS["scaled"] = programs.MODELS["135M"] | {
        "hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": heads,
        "num_key_value_heads": heads // 3,
    }  # fmt: skip
    base = programs.model("scaled", resolved("auto"), zeros=True)
    if work == "training":
        cfg = RewardConfig(batch_rows=rows, max_tokens=tokens)
        program, arguments, static = programs.reward(base, cfg)
    else:
        cfg = PPOConfig(batch=rows, forward_batch=rows, prompt_tokens=64, response_tokens=tokens)
        program, arguments, static = programs.sampling(base, cfg)
    state, *others = programs.filled(arguments)
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        result = jax.block_until_ready(program(state, *others, **static))
        state = result[0] if work == "training" else state
        seconds.append(time.perf_counter() - began)
    weights = sum(x.size for x in jax.tree.leaves(base.state) if x.ndim == 2)
    embedding = base.config.vocab_size * base.config.embed_dim
    return {"seconds": seconds[1:], "millions": (weights - embedding) / 1e6}


def plot(found: dict, path: Path) -> None:
    """Every series on logarithmic axes, with the exponent of its fitted power."""
    from matplotlib import pyplot as plt

    from rlhf_report import style

    figure, axes = plt.subplots(1, len(AXES), figsize=(7, 2.8), layout="constrained", sharey=True)
    looks = {"training": (style.BLUE, "o-"), "sampling": (style.ORANGE, "s--")}
    for (work, name), (sizes, medians, exponent) in found.items():
        ax = axes[[key for key in found if key[0] == work].index((work, name))]
        color, line = looks[work]
        ax.plot(sizes, medians, line, color=color, label=f"{work}: {exponent:.2f}")
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes], minor=False)
        ax.set_yticks(TICKS, map(str, TICKS))
        ax.minorticks_off()
        ax.legend(fontsize=7)
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main()
