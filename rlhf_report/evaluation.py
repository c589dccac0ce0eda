"""The chapter on evaluation, and the overview: how the policies compare on unseen prompts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiment_runs.assignment import KL_BAND
from experiment_runs.run import Run
from rlhf_report.ppo import draw_kl
from rlhf_report.style import (
    GREY,
    POLICY_NAMES,
    VARIANT_STYLES,
    by_sign,
    panels,
    percent_with_interval,
    policy_name,
    variant_of,
    with_interval,
)


def overview_figure(evaluation: Run, training: Mapping[str, Run]) -> None:
    """The first page's picture: mean rewards, and how far from the start the policies went."""
    _, axes = panels(2, height=2.1)
    policies = evaluation.summary["policies"]
    draw_intervals(axes[0], {name: policies[name]["reward"] for name in ("pretrained", *training)})
    axes[0].set_xlabel("mean reward")
    draw_kl(axes[1], training)


def rewards_figure(run: Run) -> None:
    """Mean reward of each policy on unseen prompts, and the paired gains, with 95 % intervals."""
    policies, gains = run.summary["policies"], run.summary["gains"]
    _, axes = panels(2, height=1.2 + 0.25 * len(policies))
    draw_intervals(axes[0], {name: own["reward"] for name, own in policies.items()})
    draw_intervals(axes[1], {name: own["reward"] for name, own in gains.items()})
    axes[0].set_xlabel("mean reward")
    axes[1].set_xlabel("gain over pretrained")


def draw_intervals(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Estimates with their intervals, one for each policy."""
    for y, (name, own) in enumerate(rows.items()):
        error = [[own["value"] - own["low"]], [own["high"] - own["value"]]]
        style = VARIANT_STYLES[variant_of(name)] | {"linestyle": ""}
        ax.errorbar(own["value"], y, xerr=error, markersize=6, capsize=4, **style)
    ax.axvline(0, color=GREY, linestyle=":")
    ax.set(
        yticks=range(len(rows)), yticklabels=map(policy_name, rows), ylim=(len(rows) - 0.5, -0.5)
    )


def reward_against_kl_figure(run: Run, training: Mapping[str, Run]) -> None:
    """Reward against the square root of the KL per response (Gao et al., 2023).

    Filled marks and solid lines are of the reward that was optimised, hollow and dashed ones of the
    second reward model.
    """
    _, (ax,) = panels(1, width=5.6)
    chosen = run.summary["best_of_n"]
    places = [np.sqrt(row["kl_per_sequence"]) for row in chosen]
    for reward, label, line in (("reward", "best of n", "-"), ("second_reward", None, "--")):
        values = [row[reward]["value"] for row in chosen]
        ax.plot(places, values, line, color="black", marker="|", linewidth=0.8, label=label)
    last = chosen[-1]
    ax.annotate(f"n = {last['n']}", (places[-1], last["reward"]["value"]),
                xytext=(3, 3), textcoords="offset points", fontsize=7)  # fmt: skip
    for name, own in training.items():
        metrics, style = own.metrics(), VARIANT_STYLES[variant_of(name)]
        ax.scatter(
            np.sqrt(metrics["kl_sequence"].clip(lower=0)), metrics["reward"], s=10, alpha=0.4,
            color=style["color"], marker=style["marker"],
        )  # fmt: skip
    for name, own in run.summary["policies"].items():
        style = VARIANT_STYLES[variant_of(name)]
        place = np.sqrt(max(own["kl_per_sequence"], 0))
        label = policy_name(name) if name in VARIANT_STYLES else None
        ax.scatter(place, own["reward"]["value"], s=60, color=style["color"],
                   marker=style["marker"], edgecolor="black", label=label)  # fmt: skip
        ax.scatter(place, own["second_reward"]["value"], s=60, facecolor="none",
                   marker=style["marker"], edgecolor=style["color"])  # fmt: skip
    ax.set(xlabel="square root of KL (nats per response)", ylabel="reward")
    ax.legend(title="unseen prompts", loc="center left", bbox_to_anchor=(1, 0.5))


def policies_table(run: Run) -> pd.DataFrame:
    """Every policy on the unseen prompts."""
    rows = []
    for name, own in run.summary["policies"].items():
        rows.append(
            {
                "policy": policy_name(name), "mean reward": with_interval(own["reward"], 2),
                "by the second reward model": with_interval(own["second_reward"], 2),
                "KL per token": own["kl_per_token"], "KL per response": own["kl_per_sequence"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def texts_table(run: Run) -> pd.DataFrame:
    """What the responses look like; none of this was optimised."""
    rows = []
    for name, own in run.summary["policies"].items():
        rows.append(
            {
                "policy": policy_name(name), "tokens": own["tokens"],
                "ended": f"{own['ended']:.0%}", "empty": f"{own['empty']:.0%}",
                "perplexity": own["perplexity"], "distinct-1": own["distinct_1"],
                "distinct-2": own["distinct_2"], "repeated": f"{own['repetition']:.0%}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def answers_reading(summary: Mapping[str, Any]) -> str:
    """How many responses were drawn, and what the intervals draw."""
    return (
        f"Each policy answers each prompt {summary['responses_per_prompt']} times. The intervals "
        f"draw the {summary['conversations']} conversations that the prompts belong to, and a "
        "prompt counts once, with the mean of its responses."
    )


def changes_reading(summary: Mapping[str, Any]) -> str:
    """What changed in the responses of both variants besides the reward that was optimised."""
    base, sentences = summary["policies"]["pretrained"], []
    for name in ("ppo-full", "ppo-lora"):
        own, gain = summary["policies"][name], summary["gains"][name]["second_reward"]
        by_second = by_sign(gain, "better", "worse", "no different")
        words = {"distinct_2": "distinct pairs of words", "repetition": "repeated text"}
        words |= {"ended": "answers that end"}
        parts = [f"perplexity {base['perplexity']:.1f} to {own['perplexity']:.1f}"]
        parts += [f"{text} {base[key]:.0%} to {own[key]:.0%}" for key, text in words.items()]
        sentences.append(
            f"{policy_name(name)}: {by_second} by the second reward model "
            f"({with_interval(gain, 2)}); {', '.join(parts)}"
        )
    return ". ".join(sentences) + "."


def cut_reading(summary: Mapping[str, Any]) -> str:
    """How many prompts were longer than what the policies read."""
    return (
        f"Of {summary['prompts_cut']} of the {summary['prompts']} prompts the policies and the "
        "reward model read the beginning only, because they are longer than a prompt may be."
    )


def gains_table(run: Run) -> pd.DataFrame:
    """The tuned policies against the pretrained one, prompt by prompt, and means over seeds."""
    rows, summary = [], run.summary
    named = [(policy_name(name), own) for name, own in summary["gains"].items()]
    named += [
        (f"{POLICY_NAMES[name]}, mean of seeds", own) for name, own in summary["variants"].items()
    ]
    for name, own in named:
        rows.append(
            {
                "policy": name, "gain": with_interval(own["reward"], 2),
                "by the second reward model": with_interval(own["second_reward"], 2),
                "wins / ties / losses": f"{own['wins']} / {own['ties']} / {own['losses']}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def second_model_reading(second_reward: Run) -> str:
    """How far the second reward model can be believed: its own accuracy, beside the baseline's."""
    summary = second_reward.summary
    own, longer = map(
        percent_with_interval, (summary["accuracy"], summary["baselines"]["longer"]["accuracy"])
    )
    return (
        f"The second reward model orders {own} of its own held-out pairs as the data have them; "
        f"naming the longer answer, {longer}. It has the same base, loss and kind of posts as the "
        "first, so that it is no independent judge."
    )


def cap_reading(summary: Mapping[str, Any]) -> str:
    """How many responses were cut off, and whether that keeps lengths from varying."""
    cut = [1 - own["ended"] for own in summary["policies"].values()]
    text = (
        f"Of the responses {min(cut):.0%} to {max(cut):.0%}, by policy, are cut off at the longest "
        "length and judged with an end pasted on."
    )
    if max(cut) < 0.5:
        return f"{text} The lengths of the others vary."
    return f"{text} Their lengths hardly vary, so that what length explains cannot be seen here."


def length_table(run: Run) -> pd.DataFrame:
    """How much of each gain is left between responses of like length, and what share length
    explains, where there is a gain to explain."""
    rows = []
    for name, own in run.summary["gains"].items():
        rows.append(
            {
                "policy": policy_name(name), "change in tokens": with_interval(own["tokens"], 1),
                "gain": own["reward"]["value"],
                "linear in length": with_interval(own["length_controlled"], 2),
                "within classes": with_interval(own["stratified"], 2),
                "explained by length": share_explained_by_length(own),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def share_explained_by_length(own: Mapping[str, Mapping[str, float]]) -> str:
    """The share of a gain that is gone at equal length; a dash where the gain may be zero."""
    gain = own["reward"]
    if gain["low"] <= 0 <= gain["high"]:
        return "–"
    return f"{1 - own['length_controlled']['value'] / gain['value']:.0%}"


def gain_reading(own: Mapping[str, Any]) -> str:
    """What an interval of a gain allows to say."""
    return by_sign(
        own["reward"],
        "higher than the pretrained policy's, beyond what chance explains",
        "lower than the pretrained policy's, beyond what chance explains",
        "not distinguishable from the pretrained policy's with so many prompts",
    )


def gain_example(run: Run, name: str) -> str:
    """A policy's gain as the difference of two means, worked out with the numbers as printed: with
    as many digits as it takes to get the gain that is printed elsewhere, with three."""
    policies = run.summary["policies"]
    means = [policies[x]["reward"]["value"] for x in (name, "pretrained")]
    for digits in range(3, 10):
        tuned, base = (round(x, digits) + 0.0 for x in means)  # which makes no zero of -0.0004
        if f"{tuned - base:.3f}" == f"{means[0] - means[1]:.3f}":
            break
    shown = f"({base:.{digits}f})" if base < 0 else f"{base:.{digits}f}"
    return f"{tuned:.{digits}f} - {shown} = {tuned - base:.{digits}f}"


def kl_example(run: Run, name: str) -> str:
    """The KL of a policy's response to the first unseen prompt, in all and per token."""
    arrays = run.arrays()
    kl, tokens = arrays[f"{name}.kl"].flat[0], max(1, int(arrays[f"{name}.tokens"].flat[0]))
    kl = round(float(kl), 2)
    return f"{kl:.2f} nats over {tokens} tokens, {kl / tokens:.3f} a token"


def seeds_reading(summary: Mapping[str, Any]) -> str:
    """What the runs of each variant with different seeds say together, from an evaluation."""
    parts = []
    for name, own in summary["variants"].items():
        values = [
            gain["reward"]["value"]
            for run, gain in summary["gains"].items()
            if variant_of(run) == name
        ]
        parts.append(
            f"{POLICY_NAMES[name]}: {min(values):.2f} to {max(values):.2f} with {len(values)} "
            f"seeds, {with_interval(own['reward'], 2)} their mean (seeds and conversations "
            "drawn)"
        )
    return f"Gains: {'; '.join(parts)}." if parts else "Each variant was trained with one seed."


def uncertain_runs_reading(runs: Mapping[str, Run], gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each run that gained nothing for certain or left the band: what its log shows of why."""
    texts = []
    for name, run in runs.items():
        metrics, gain = run.metrics(), gains[name]["reward"]
        final = metrics.iloc[-1]
        if gain["low"] > 0 and KL_BAND[0] <= final["kl"] <= KL_BAND[1]:
            continue
        text = (
            f"{policy_name(name)}: gain {with_interval(gain, 2)}, KL {final['kl']:.3f} nats a token"
        )
        above = metrics["kl"] > KL_BAND[1]
        text += (
            f", above the band first at step {metrics['step'][above.idxmax()]}"
            if above.any()
            else ""
        )
        price, spread = final["kl_weight"] * final["kl_sequence"], final["reward_std"]
        text += (
            f". At the end a response paid {price:.2f} for its KL, where the rewards of a batch "
            f"had a standard deviation of {spread:.2f}"
        )
        text += ": the penalty outweighs the reward." if price > spread else "."
        texts.append(text)
    return "\n".join(f"* {text}" for text in texts) or "There are none."
