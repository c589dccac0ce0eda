"""Figures of the report, drawn from runs. Readable in grey: lines differ in dash and marker too."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.runs import Run

# Okabe and Ito's palette, whose colours the colour-blind tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
VARIANTS = {
    "pretrained": {"color": GREY, "linestyle": ":", "marker": "s"},
    "ppo-full": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "ppo-lora": {"color": ORANGE, "linestyle": "--", "marker": "^"},
}
LABELS = {"pretrained": "pretrained", "ppo-full": "PPO, full", "ppo-lora": "PPO, LoRA"}
STYLE = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4,
}
plt.rcParams.update(STYLE)


def panels(count: int, *, height: float = 2.6, width: float = 7.0) -> tuple[Figure, Sequence[Axes]]:
    """Some axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(axes)


def overview(evaluation: Run, training: Mapping[str, Run]) -> None:
    """The first page's picture: mean rewards, and how far from the start the policies went."""
    _, axes = panels(2, height=2.1)
    policies = evaluation.summary["policies"]
    points(axes[0], {name: policies[name]["reward"] for name in VARIANTS})
    axes[0].set_ylabel("mean reward")
    kl_lines(axes[1], training)


def kl_curves(runs: Mapping[str, Run]) -> None:
    """KL to the reference with the band that it should stay in, and its coefficient."""
    _, axes = panels(2)
    kl_lines(axes[0], runs)
    for name, run in runs.items():
        metrics = run.metrics()
        axes[1].plot(metrics["step"], metrics["kl_weight"], **line_style(name, len(metrics)))
    axes[1].set(xlabel="step", ylabel="coefficient (reward per nat)")


def kl_lines(ax: Axes, runs: Mapping[str, Run]) -> None:
    """KL to the reference against training steps, and the protocol's band."""
    ax.axhspan(0.02, 0.1, color=GREEN, alpha=0.15, label="band 0.02 to 0.1")
    for name, run in runs.items():
        metrics = run.metrics()
        ax.plot(metrics["step"], metrics["kl"], **line_style(name, len(metrics)))
    ax.set(xlabel="step", ylabel="KL (nats per token)", ylim=(0, None))
    ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1, handlelength=1.7
    )


def line_style(name: str, count: int) -> dict[str, Any]:
    """How a variant's line of so many points looks, with about ten markers."""
    return VARIANTS[name] | {"label": LABELS[name], "markevery": max(1, count // 10)}


def ppo_learning(runs: Mapping[str, Run]) -> None:
    """Reward of the episodes, entropy, and what the critic explains."""
    shown = {
        "reward": "reward of the episodes",
        "entropy": "entropy (nats per token)",
        "explained_variance": "critic's explained variance",
    }
    by_step(runs, shown)


def update_health(runs: Mapping[str, Run]) -> None:
    """How far each update moved the policy, how much was clipped, how long responses are."""
    shown = {
        "approx_kl": "approximate KL of an update",
        "clip_fraction": "clipped share",
        "response_tokens": "tokens per response",
    }
    by_step(runs, shown, ylim=(0, None))


def by_step(runs: Mapping[str, Run], shown: Mapping[str, str], **limits) -> None:
    """A panel for each logged column, a line for each variant."""
    _, axes = panels(len(shown))
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        for name, run in runs.items():
            metrics = run.metrics()
            ax.plot(metrics["step"], metrics[column], **line_style(name, len(metrics)))
        ax.set(xlabel="step", ylabel=label, **limits)
    middle = axes[len(axes) // 2]
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(runs))


def mean_rewards(run: Run) -> None:
    """Mean reward of each policy on unseen prompts, and the paired gains, with 95 % intervals."""
    summary = run.summary
    _, axes = panels(2)
    for ax, rows in zip(axes, (summary["policies"], summary["gains"]), strict=True):
        points(ax, {name: rows[name]["reward"] for name in VARIANTS if name in rows})
    axes[0].set_ylabel("mean reward")
    axes[1].set_ylabel("gain over pretrained")


def points(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Estimates with their intervals, one for each policy."""
    for x, (name, own) in enumerate(rows.items()):
        error = [[own["value"] - own["low"]], [own["high"] - own["value"]]]
        ax.errorbar(
            x, own["value"], yerr=error, color=VARIANTS[name]["color"],
            marker=VARIANTS[name]["marker"], markersize=7, capsize=4,
        )  # fmt: skip
    ax.axhline(0, color=GREY, linestyle=":")
    ax.set(xticks=range(len(rows)), xticklabels=[LABELS[name] for name in rows])
    ax.margins(x=0.3)


def reward_against_kl(run: Run, training: Mapping[str, Run]) -> None:
    """Reward against the square root of the KL per response (Gao et al., 2023)."""
    _, (ax,) = panels(1, width=4.2)
    for name, own in training.items():
        metrics = own.metrics()
        ax.scatter(
            np.sqrt(metrics["kl_sequence"].clip(lower=0)), metrics["reward"], s=10, alpha=0.4,
            color=VARIANTS[name]["color"], marker=VARIANTS[name]["marker"],
        )  # fmt: skip
    for name, own in run.summary["policies"].items():
        ax.scatter(
            np.sqrt(max(own["kl_per_sequence"], 0)), own["reward"]["value"], s=60,
            color=VARIANTS[name]["color"], marker=VARIANTS[name]["marker"],
            edgecolor="black", label=LABELS[name],
        )  # fmt: skip
    ax.set(xlabel="square root of KL (nats per response)", ylabel="reward")
    ax.legend(title="unseen prompts")
