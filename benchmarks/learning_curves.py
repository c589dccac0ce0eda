"""Learning curves in float32 and in mixed precision: `python benchmarks/learning_curves.py`.

Three seeds each of a reward model on the documentation of the installed packages and of a policy on
the reward of examples/known_optimum.py, both from SmolLM2-135M. Further sides, of one seed, are
what a difference looks like: float32 with half the learning rate, and, for the reward model, which
trains all weights, mixed with weights rounded to nearest. Goes on where it was cut off; writes a
table and a plot, results/measured/learning_curves.txt and .png.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import turns

STEADY, CHANGED, CONTROL = "float32", "mixed", "float32, half the rate"
NEAREST = "mixed, to nearest"
SEEDS = {STEADY: 3, CHANGED: 3, CONTROL: 1}
WORKS = {"reward": "loss", "policy": "reward"}  # what of each is followed
SIDES = {"reward": SEEDS | {NEAREST: 1}, "policy": SEEDS}
TITLES = {"reward": "Reward model", "policy": "Policy"}
Curves = Mapping[str, np.ndarray]  # by side, of a seed and a step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=turns.PROJECT / "results/local/curves")
    options.add_argument(
        "--output", type=Path, default=turns.PROJECT / "results/measured/learning_curves.txt"
    )
    options.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    options.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    options.add_argument("--side", choices=SIDES["reward"], help=argparse.SUPPRESS)
    options.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.side:
        curve(args).to_json(path(args))
        return
    lines, found = [turns.circumstances()], {}
    for work in args.works:
        each = {
            side: [made(args, work, side, seed) for seed in range(number)]
            for side, number in SIDES[work].items()
        }
        steps = min(len(own) for curves in each.values() for own in curves)  # data differ by seed
        found[work] = {side: np.stack([x[:steps] for x in own]) for side, own in each.items()}
        lines += ["", f"## {TITLES[work]}, {WORKS[work]} of a step", "", compared(found[work])]
    turns.keep("\n".join(lines), args.output)
    plot(found, args.output.with_suffix(".png"))


def made(args: argparse.Namespace, work: str, side: str, seed: int) -> np.ndarray:
    """The curve of one training, in a process of its own where there is none yet."""
    args = argparse.Namespace(folder=args.folder, work=work, side=side, seed=seed)
    if not path(args).exists():
        words = ["--folder", args.folder, "--work", work, "--side", side, "--seed", str(seed)]
        shared = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(args.folder / "compiled")}
        subprocess.run([sys.executable, __file__, *words], check=True, env=shared)
    return pd.read_json(path(args), typ="series").to_numpy()


def path(args: argparse.Namespace) -> Path:
    """Where a training's curve is kept."""
    return args.folder / f"{args.work} {args.side} {args.seed}.json"


def curve(args: argparse.Namespace) -> pd.Series:
    """What is followed of one training, by step."""
    import rlhf_jax
    from experiment_runs import products

    sys.path.insert(0, str(turns.PROJECT / "examples"))
    import known_optimum

    from rlhf_jax.data import documentation

    model = rlhf_jax.load(turns.SMOLLM2, precision=args.side.split(",")[0])
    if args.side == NEAREST:
        products.rounded_by_place = lambda weights, rows: weights.astype("bfloat16")
    slower = 0.5 if args.side == CONTROL else 1.0
    out = args.folder / "runs" / args.side
    if args.work == "reward":
        pairs = documentation.preferences().query("grade == 'medium'")
        cfg = rlhf_jax.RewardConfig(
            learning_rate=3e-6 * slower, epochs=1, batch_pairs=4, batch_rows=3, max_tokens=128,
            train_pairs=64, validation_pairs=16, test_pairs=16, evaluations_per_epoch=1,
            max_pairs_per_post=1, reference_samples=2, reference_prompt_tokens=32,
            reference_response_tokens=4, seed=args.seed,
        )  # fmt: skip
        run = rlhf_jax.train_reward_model(model, pairs, config=cfg, out=out).run
    else:
        cfg = rlhf_jax.PPOConfig(
            lora=rlhf_jax.LoRAConfig(rank=16, dropout=0.0, targets=known_optimum.LINEAR_LAYERS),
            advantages="group", learning_rate=2e-3 * slower, prompts=24, batch=16,
            forward_batch=16, responses_per_prompt=4, passes=2, inner_epochs=2, prompt_tokens=40,
            response_tokens=16, kl_weight=1e-3, target_kl=5.0, missing_end_penalty=0.0,
            seed=args.seed,
        )  # fmt: skip
        reward = known_optimum.share_of_listed_words
        run = rlhf_jax.train_policy(
            model, known_optimum.PROMPTS, reward=reward, config=cfg, out=out
        ).run
    return run.metrics().set_index("step")[WORKS[args.work]]


def compared(curves: Curves) -> str:
    """The mean over all steps, which is the area under the curve, seed by seed, and how far it is
    from float32's beside how far the seeds are from each other."""
    means = {side: own.mean(axis=1) for side, own in curves.items()}
    lines = [f"the seeds of {STEADY} lie within {np.ptp(means[STEADY]):.3f} of each other"]
    for side, own in means.items():
        line = f"{side}: {written(own, '.3f')}; mean {own.mean():.3f}"
        if side != STEADY:
            apart = own - means[STEADY][: len(own)]
            line += f"; less {STEADY}: {written(apart, '+.3f')}; mean {apart.mean():+.3f}"
        lines.append(line)
    return "\n".join(f"* {line}" for line in lines)


def written(values: Sequence[float], how: str) -> str:
    """Numbers in a row, in one format."""
    return ", ".join(format(value, how) for value in values)


def plot(found: Mapping[str, Curves], target: Path) -> None:
    """Mean of the seeds as a line, their range as a band, over three steps at a time."""
    from matplotlib import pyplot as plt

    from rlhf_report import style

    size = 7, 2.8
    figure, axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    looks = {
        STEADY: (style.BLUE, "-"), CHANGED: (style.ORANGE, "--"), CONTROL: (style.GREY, ":"),
        NEAREST: (style.GREEN, "-."),
    }  # fmt: skip
    for ax, (work, curves) in zip(axes[0], found.items(), strict=True):
        for side, own in curves.items():
            color, line = looks[side]
            smooth = pd.DataFrame(own.T).rolling(3, min_periods=1).mean()
            ax.plot(smooth.index + 1, smooth.mean(axis=1), line, color=color, label=side)
            low, high = smooth.min(axis=1), smooth.max(axis=1)
            ax.fill_between(smooth.index + 1, low, high, color=color, alpha=0.2, linewidth=0)
        ax.set(xlabel="step", ylabel=f"{TITLES[work]}, {WORKS[work]}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=200)


if __name__ == "__main__":
    main()
