"""The chapter on PPO: tables, figures and readings of its runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.axes import Axes

from experiment_runs import assignment, settings
from experiment_runs.assignment import KL_BAND
from experiment_runs.inventory import training_seconds
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_jax.ppo.rollout import REWARD_EDGES
from rlhf_report.style import (
    GREY,
    count_axis,
    from_zero,
    legend_above,
    line_style,
    log_axis,
    panels,
    policy_name,
)

ESTIMATORS = {  # of advantages, and the stages whose style they share
    "gae": "ppo-lora",
    "leave-one-out": "ppo-leave-one-out",
    "group": "ppo-group",
}


def kl_figure(runs: Mapping[str, Run]) -> None:
    """KL to the reference with its band, the coefficient, and the reward that was got for it."""
    figure, axes = panels(3)
    draw_kl(axes[0], runs)
    axes[0].get_legend().remove()
    shown = {"kl_weight": "coefficient (reward per nat)", "reward": "reward of the episodes"}
    for ax, (column, label) in zip(axes[1:], shown.items(), strict=True):
        draw_column(ax, runs, column, label)
    log_axis(axes[1])
    legend_above(figure, axes[0])


def known_optimum_runs() -> dict[str, Run]:
    """The committed runs of examples/known_optimum.py by the stage whose style they share."""
    found = map(Run, sorted((settings.RESULTS / "known-optimum").glob("ppo-*")))
    by_estimator = {run.config["advantages"]: run for run in found}
    return {stage: by_estimator[name] for name, stage in ESTIMATORS.items()}


def known_optimum_figure(runs: Mapping[str, Run]) -> None:
    """Reward of each step's episodes under every estimator, and the largest that there is."""
    _, (ax,) = panels(1, width=5.0)
    draw_column(ax, runs, "reward", "share of listed words")
    ax.axhline(1, color=GREY, linestyle=":", label="the largest there is")
    ax.set_ylim(0, 1.05)
    ax.legend(loc="lower right")


def known_optimum_reading(runs: Mapping[str, Run]) -> str:
    """Where every estimator begins and ends, as means over a tenth of its steps, and with what."""
    told = []
    for name, run in runs.items():
        rewards = run.metrics()["reward"]
        few = max(len(rewards) // 10, 1)
        response = run.samples(response=str)[-1]["response"]
        told.append(
            f"{policy_name(name)} from {rewards[:few].mean():.2f} to {rewards[-few:].mean():.2f} "
            f"in {len(rewards)} steps and {training_seconds(run) / 60:.0f} minutes, "
            f"with responses such as \u201c{response}\u201d"
        )
    return f"{'; '.join(told)}."


def draw_column(ax: Axes, runs: Mapping[str, Run], column: str, label: str) -> None:
    """A logged quantity against training steps, a line for each run that logged it."""
    for name, run in runs.items():
        metrics = run.metrics()
        if column in metrics:  # not everyone has a critic
            ax.plot(metrics["step"], metrics[column], **line_style(name, len(metrics)))
    ax.set(xlabel="step", ylabel=label)
    count_axis(ax)


def draw_kl(ax: Axes, runs: Mapping[str, Run]) -> None:
    """KL to the reference against training steps, and the protocol's band."""
    ax.axhspan(*KL_BAND, color=GREY, alpha=0.15, label="band {} to {}".format(*KL_BAND))
    draw_column(ax, runs, "kl", "KL (nats per token)")
    from_zero(ax)
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(3, len(ax.get_legend_handles_labels()[0])),
        columnspacing=1,
        handlelength=1.7,
    )


def learning_figure(runs: Mapping[str, Run]) -> None:
    """Entropy of the policy, and what the critic explains."""
    shown = {
        "entropy": "entropy (nats per token)",
        "explained_variance": "critic's explained variance",
    }
    step_figure(runs, shown)


def update_health_figure(runs: Mapping[str, Run]) -> None:
    """How far each update moved the policy, how much was clipped, how long responses are."""
    shown = {
        "approx_kl": "approximate KL of an update",
        "clip_fraction": "clipped share",
        "response_tokens": "tokens per response",
    }
    for ax in step_figure(runs, shown):
        from_zero(ax)


def step_figure(runs: Mapping[str, Run], shown: Mapping[str, str]) -> Sequence[Axes]:
    """A panel for each logged column, a line for each variant."""
    figure, axes = panels(len(shown))
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        draw_column(ax, runs, column, label)
    legend_above(figure, axes[0])
    return axes


def reward_distribution_figure(runs: Mapping[str, Run]) -> None:
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
        count_axis(ax)
        ax.grid(visible=False)
        figure.colorbar(mesh, ax=ax, label="share of the episodes")


def last_samples(run: Run, count: int = 3) -> list[dict[str, Any]]:
    """The episodes that were kept last."""
    return run.samples()[-count:]


def missing_end_reading(run: Run) -> Markdown:
    """What a response pays for being cut off."""
    penalty = run.config["missing_end_penalty"]
    if penalty == 0:
        return Markdown("A response that was cut off pays nothing for it here.")
    return Markdown(
        f"A response that was cut off, without an end token, has its $r(x, y)$ cut by {penalty:g}."
    )


def kl_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Where each run's KL per token ended and how long it was inside the band."""
    rows = []
    for name, run in runs.items():
        metrics = run.metrics()
        inside = metrics["kl"].between(*KL_BAND)
        rows.append(
            {
                "policy": policy_name(name), "KL per token at the end": metrics["kl"].iloc[-1],
                "steps inside": f"{inside.sum()} of {len(metrics)}",
                "first inside": metrics["step"][inside.idxmax()] if inside.any() else None,
                "coefficient at the end": metrics["kl_weight"].iloc[-1],
                "reward, last quarter": run.summary["reward_last_quarter"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype({"first inside": "Int64"})


def kl_reading(run: Run) -> str:
    """Where the KL per token stood against its band, from the numbers."""
    metrics = run.metrics()
    inside = metrics["kl"].between(*KL_BAND)
    last = metrics["kl"].iloc[-1]
    where = "below" if last < KL_BAND[0] else "above" if last > KL_BAND[1] else "inside"
    text = f"it ended {where} the band at {last:.4f} nats per token"
    stretch = inside[::-1].cumprod()[::-1].astype(bool)  # the steps at the end without a break
    if stretch.any():
        text += f", inside without a break since step {metrics['step'][stretch.idxmax()]}"
    elif inside.any():
        text += f", first inside at step {metrics['step'][inside.idxmax()]}"
    text += f", and was inside for {inside.mean():.0%} of the steps"
    first, now = metrics["kl_weight"].iloc[0], metrics["kl_weight"].iloc[-1]
    if where != "inside":
        text += f"; the coefficient had gone from {first:.3g} to {now:.3g}"
    return text


def learning_rates_reading(full: Run, lora: Run) -> str:
    """The learning rates, and how LoRA's compares with that of full fine-tuning."""
    rates = [run.config["learning_rate"] for run in (full, lora)]
    times = rates[1] / rates[0]
    if abs(times - 1) < 0.01:
        how = "the same"
    else:
        how = f"{times:.3g} times as much" if times > 1 else f"{1 / times:.3g} times less"
    return f"{rates[0]:g} and {rates[1]:g}, {how}"


def limits_reading(full: Run, lora: Run) -> str:
    """Why the variants are not ranked: their rates, their steps beside the protocol's, one seed."""
    asked, steps = assignment.values("ppo"), full.summary["steps"]
    protocol = asked["passes"] * asked["prompts"] // asked["batch"]
    reasons = []
    if steps < protocol:
        reasons.append(f"{steps} steps are few beside the protocol's {protocol}")
    if full.config["learning_rate"] != lora.config["learning_rate"]:
        reasons.append("the learning rates of the two variants differ (the appendix compares them)")
    if not reasons:
        return (
            f"{steps} steps at one learning rate leave the seed as the reason not to rank the "
            "variants here."
        )
    told = ", and ".join(reasons)
    return f"{told[0].upper()}{told[1:]}, so the variants are not ranked here."


def first_ratio_reading(run: Run) -> str:
    """How near to 1 the ratios of the very first pass were."""
    error = run.metrics()["first_ratio_error"].iloc[0]
    return f"1 to within {error:.1g}, which is rounding" if error else "exactly 1 all the same"


def symbols_table(run: Run) -> pd.DataFrame:
    """The value of every symbol of the chapter in this run."""
    cfg = run.config
    rows = [
        (r"$\gamma$", "discount, per token", cfg["discount"]),
        (r"$\lambda$", "decay of the advantages, per token", cfg["gae_decay"]),
        (r"$\epsilon$", "clip of the ratio", cfg["ratio_clip"]),
        (r"$\epsilon_V$", "clip of the critic, in units of the reward", cfg["value_clip"]),
        (r"$c_V$", "weight of the critic's loss", cfg["value_weight"]),
        (r"$\beta$", "price of the KL at the start, reward per nat", cfg["kl_weight"]),
        (r"$k^*$", "target of the KL, nats per token", cfg["target_kl"]),
        (r"$g$", "gain of its controller, per step", cfg["kl_gain"]),
    ]
    shown = [(Markdown(symbol), meaning, f"{value:g}") for symbol, meaning, value in rows]
    return pd.DataFrame(shown, columns=["symbol", "meaning", "value"])


def advantage_example(run: Run) -> pd.DataFrame:
    """The advantages of a response of three tokens, worked out with this run's settings."""
    discount, decay = run.config["discount"], run.config["gae_decay"]
    rewards, values = np.array([-0.02, -0.01, 0.8]), np.array([0.3, 0.4, 0.5])
    surprises = rewards + discount * np.append(values[1:], 0) - values
    advantages = objectives.generalized_advantages(
        *(jnp.asarray(x)[None] for x in (rewards, values, np.ones(3, bool))),
        discount=discount, decay=decay,
    )  # fmt: skip
    return pd.DataFrame(
        {
            "t": [1, 2, 3], "reward": rewards, "value": values, "delta": surprises,
            "advantage": np.asarray(advantages[0], float),
        }
    )  # fmt: skip


def dropout_reading(run: Run) -> str:
    """What dropout in the updates does to ratios that would be 1."""
    later = run.metrics().iloc[1:]
    if not run.config["lora"]["dropout"] or later.empty:
        why = "There was one update" if later.empty else "Its rate was 0 in this run"
        return f"{why}, so that it moved no later ratio either."
    error, kl = later["first_ratio_error"].median(), later["first_approx_kl"].median()
    return (
        f"Later the ratios of an update's first pass differ from 1 by {error:.3f} "
        f"(an approximate KL of {kl:.1e}), which the clip of the ratio has to live with."
    )
