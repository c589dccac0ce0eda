"""Figures of the report, drawn from runs. Readable in grey: lines differ in dash and marker too."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment_runs.run import Run
from reporting.summaries import BAND, policy_name, variant
from rlhf_jax.ppo.rollout import REWARD_EDGES

# Okabe and Ito's palette, whose colours the colour-blind tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
VARIANTS = {
    "pretrained": {"color": GREY, "linestyle": ":", "marker": "s"},
    "ppo-full": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "ppo-lora": {"color": ORANGE, "linestyle": "--", "marker": "^"},
    "ppo-lora-everywhere": {"color": GREEN, "linestyle": "-.", "marker": "D"},
}
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
    points(axes[0], {name: policies[name]["reward"] for name in ("pretrained", *training)})
    axes[0].set_xlabel("mean reward")
    kl_lines(axes[1], training)


def kl_curves(runs: Mapping[str, Run]) -> None:
    """KL to the reference with its band, the coefficient, and the reward that was got for it."""
    figure, axes = panels(3)
    kl_lines(axes[0], runs)
    axes[0].get_legend().remove()
    shown = {"kl_weight": "coefficient (reward per nat)", "reward": "reward of the episodes"}
    for ax, (column, label) in zip(axes[1:], shown.items(), strict=True):
        for name, run in runs.items():
            metrics = run.metrics()
            ax.plot(metrics["step"], metrics[column], **line_style(name, len(metrics)))
        ax.set(xlabel="step", ylabel=label)
    axes[1].set(yscale="log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def kl_lines(ax: Axes, runs: Mapping[str, Run]) -> None:
    """KL to the reference against training steps, and the protocol's band."""
    ax.axhspan(*BAND, color=GREY, alpha=0.15, label="band {} to {}".format(*BAND))
    for name, run in runs.items():
        metrics = run.metrics()
        ax.plot(metrics["step"], metrics["kl"], **line_style(name, len(metrics)))
    ax.set(xlabel="step", ylabel="KL (nats per token)", ylim=(0, None))
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(3, len(ax.get_legend_handles_labels()[0])),
        columnspacing=1,
        handlelength=1.7,
    )


def line_style(stage: str, count: int) -> dict[str, Any]:
    """How a line of so many points looks, with about ten markers; a further seed's is thin."""
    style = VARIANTS[variant(stage)]
    if stage not in VARIANTS:
        return style | {"marker": "", "linewidth": 0.8, "alpha": 0.6}
    return style | {"label": policy_name(stage), "markevery": max(1, count // 10)}


def ppo_learning(runs: Mapping[str, Run]) -> None:
    """Entropy of the policy, and what the critic explains."""
    shown = {
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
    figure, axes = panels(len(shown))
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        for name, run in runs.items():
            metrics = run.metrics()
            ax.plot(metrics["step"], metrics[column], **line_style(name, len(metrics)))
        ax.set(xlabel="step", ylabel=label, **limits)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def reward_distribution(runs: Mapping[str, Run]) -> None:
    """How the rewards of a step's episodes are distributed, step by step, with their mean."""
    figure, axes = panels(len(runs))
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        metrics = run.metrics()
        counts = np.array(metrics["reward_histogram"].to_list())
        steps = np.append(metrics["step"], metrics["step"].iloc[-1] + 1) - 0.5
        shares = counts.T / counts.sum(axis=1)
        mesh = ax.pcolormesh(steps, REWARD_EDGES, shares, cmap="Greys", vmin=0)
        ax.plot(metrics["step"], metrics["reward"], **line_style(name, len(metrics)))
        ax.set(xlabel="step", ylabel="reward", title=policy_name(name))
        ax.grid(visible=False)
        figure.colorbar(mesh, ax=ax, label="share of the episodes")


def mean_rewards(run: Run) -> None:
    """Mean reward of each policy on unseen prompts, and the paired gains, with 95 % intervals."""
    policies, gains = run.summary["policies"], run.summary["gains"]
    _, axes = panels(2, height=1.2 + 0.25 * len(policies))
    points(axes[0], {name: own["reward"] for name, own in policies.items()})
    points(axes[1], {name: own["reward"] for name, own in gains.items()})
    axes[0].set_xlabel("mean reward")
    axes[1].set_xlabel("gain over pretrained")


def points(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Estimates with their intervals, one for each policy."""
    for y, (name, own) in enumerate(rows.items()):
        error = [[own["value"] - own["low"]], [own["high"] - own["value"]]]
        style = VARIANTS[variant(name)] | {"linestyle": ""}
        ax.errorbar(own["value"], y, xerr=error, markersize=6, capsize=4, **style)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set(
        yticks=range(len(rows)), yticklabels=map(policy_name, rows), ylim=(len(rows) - 0.5, -0.5)
    )


def reward_against_kl(run: Run, training: Mapping[str, Run]) -> None:
    """Reward against the square root of the KL per response (Gao et al., 2023)."""
    _, (ax,) = panels(1, width=5.6)
    for name, own in training.items():
        metrics = own.metrics()
        ax.scatter(
            np.sqrt(metrics["kl_sequence"].clip(lower=0)), metrics["reward"], s=10, alpha=0.4,
            color=VARIANTS[variant(name)]["color"], marker=VARIANTS[variant(name)]["marker"],
        )  # fmt: skip
    for name, own in run.summary["policies"].items():
        style = VARIANTS[variant(name)]
        place = np.sqrt(max(own["kl_per_sequence"], 0))
        label = policy_name(name) if name in VARIANTS else None
        ax.scatter(place, own["reward"]["value"], s=60, color=style["color"],
                   marker=style["marker"], edgecolor="black", label=label)  # fmt: skip
        ax.scatter(place, own["gold"]["value"], s=60, facecolor="none",
                   marker=style["marker"], edgecolor=style["color"])  # fmt: skip
    ax.set(xlabel="square root of KL (nats per response)", ylabel="reward")
    ax.legend(title="unseen prompts", loc="center left", bbox_to_anchor=(1, 0.5))
