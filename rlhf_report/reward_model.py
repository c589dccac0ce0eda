"""The chapter on the reward model: tables, figures and readings of its run."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from experiment_runs.run import Run
from experiment_runs.settings import RESULTS
from rlhf_report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    by_sign,
    panels,
    percent_with_interval,
    with_interval,
)
from rlhf_report.tables import escape, quote

PREDICTORS = {
    "model": {"label": "reward model", "color": BLUE, "marker": "o"},
    "longer": {"label": "longer reply wins", "color": GREY, "marker": "s"},
    "bag_of_words": {"label": "bag of words", "color": ORANGE, "marker": "^"},
    "untrained": {"label": "untrained head", "color": GREEN, "marker": "D"},
}
LONGEST_EXCERPT = 350  # characters of a text that is shown


def learning_figure(run: Run) -> None:
    """Loss and accuracy of training batches and validation pairs, over steps and epochs."""
    metrics = run.metrics()
    validation = metrics.dropna(subset="validation_loss")
    per_epoch = len(metrics) / run.config["epochs"]
    figure, axes = panels(2, height=3.0)
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        smooth = metrics[name].rolling(max(2, len(metrics) // 12), min_periods=1).mean()
        ax.plot(metrics["step"], metrics[name], color=BLUE, alpha=0.2)
        ax.plot(metrics["step"], smooth, color=BLUE, label="training, moving mean")
        ax.plot(
            validation["step"], validation[f"validation_{name}"],
            color=ORANGE, linestyle="--", marker="o", label="validation",
        )  # fmt: skip
        ax.axvline(run.summary["best"]["step"], color=GREY, linestyle=":", label="kept")
        ax.set(xlabel="step", ylabel=name)
        epochs = (lambda step: step / per_epoch, lambda epoch: epoch * per_epoch)
        ax.secondary_xaxis("top", functions=epochs).set_xlabel("epoch")
    axes[1].axhline(0.5, color=GREY, linewidth=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def trained_weights_reading(run: Run) -> str:
    """What of the model was trained."""
    count, lora = sum(run.summary["parameters"].values()), run.config["lora"]
    if lora is None:
        return f"Every weight is trained, {count:,} numbers."
    layers = ", ".join(lora["targets"])
    return (
        f"Low-rank adapters of rank {lora['rank']} on {layers} and the head are trained, "
        f"{count:,} numbers; the rest stays as it was."
    )


def predictor_results(run: Run) -> dict[str, Mapping[str, Any]]:
    """The accuracies of the reward model and of every baseline."""
    return {"model": run.summary, **run.summary["baselines"]}


def group_accuracies(own: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The accuracies of one predictor: on all pairs, on pairs of like length, and by group."""
    rows = {"all pairs": own["accuracy"]}
    if "accuracy_alike" in own:
        rows["of like length"] = own["accuracy_alike"]
    rows |= own["accuracy_by_domain"] if len(own["accuracy_by_domain"]) > 1 else {}
    return rows | {f"grade {name}": one for name, one in own.get("accuracy_by_grade", {}).items()}


def accuracy_table(run: Run) -> pd.DataFrame:
    """Held-out accuracy of every predictor, on all pairs and on groups of them."""
    columns = {name: group_accuracies(own) for name, own in predictor_results(run).items()}
    return pd.DataFrame(
        [
            {"pairs": group, "count": one["count"]}
            | {
                PREDICTORS[name]["label"]: narrow_percent(own[group])
                for name, own in columns.items()
            }
            for group, one in columns["model"].items()
        ]
    )


def narrow_percent(own: Mapping[str, float]) -> str:
    """A share with its interval, narrow enough for a column of its own."""
    low, value, high = (f"{100 * own[name]:.1f}" for name in ("low", "value", "high"))
    return f"{value} [{low},\N{NO-BREAK SPACE}{high}]"


def accuracy_figure(run: Run) -> None:
    """The same as a picture."""
    columns = {name: group_accuracies(own) for name, own in predictor_results(run).items()}
    figure, (ax,) = panels(1, height=min(8.0, 1.1 + 0.5 * len(columns["model"])))
    draw_accuracies(ax, columns)
    ax.set(xlabel="share of pairs ordered as in the data")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_accuracies(ax: Axes, columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Estimates with their intervals: a row for each group, a mark for each predictor."""
    rows = list(columns["model"])
    for k, (name, own) in enumerate(columns.items()):
        values = pd.DataFrame([own[row] for row in rows])
        ax.errorbar(
            values["value"], [y + (k - 1.5) * 0.17 for y in range(len(rows))], linestyle="none",
            xerr=[values["value"] - values["low"], values["high"] - values["value"]],
            capsize=2, **PREDICTORS[name],
        )  # fmt: skip
    ax.axvline(0.5, color=GREY, linestyle=":")
    ax.set(yticks=range(len(rows)), yticklabels=rows)
    ax.invert_yaxis()


def verdict_figure(run: Run) -> None:
    """How far chosen and rejected replies lie apart, and the ROC curve."""
    pairs, roc, auc = run.arrays("test_pairs"), run.arrays("roc"), run.summary["verdicts"]["auc"]
    _, axes = panels(2, height=2.9)
    axes[0].hist(pairs["chosen"] - pairs["rejected"], bins=40, color=BLUE)
    axes[0].axvline(0, color=GREY, linestyle=":")
    axes[0].set(xlabel="raw score of chosen minus rejected", ylabel="pairs")
    axes[1].plot(roc["false_positive"], roc["true_positive"], color=BLUE)
    axes[1].plot([0, 1], [0, 1], color=GREY, linestyle=":")
    axes[1].set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes[1].text(0.98, 0.04, f"AUC {with_interval(auc, 2)}", ha="right")


def reliability_figure(run: Run) -> None:
    """Accuracy against confidence, before and after the temperature; bars are 95 % intervals."""
    _, axes = panels(2, height=2.9)
    for ax, (when, own) in zip(axes, run.summary["calibration"].items(), strict=True):
        bins = pd.DataFrame(own["bins"])
        error = [bins["value"] - bins["low"], bins["high"] - bins["value"]]
        ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":")
        ax.errorbar(
            bins["confidence"], bins["value"], yerr=error, color=BLUE, marker="o", capsize=3
        )
        for row in bins.itertuples():
            ax.annotate(row.count, (row.confidence, 0.02), ha="center", fontsize=7, color=GREY)
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(0, 1.03))
        ax.set_title(f"{when} the temperature", fontsize=9)


def calibration_table(run: Run) -> pd.DataFrame:
    """How well the confidence can be believed, before and after the temperature."""
    rows = {"as trained": "before", "with the temperature": "after"}
    return pd.DataFrame(
        [
            {
                "scores": name, "log loss (nats)": own["log_loss"],
                "calibration error": own["error"], "if calibrated": own["error_by_chance"],
            }
            for name, own in ((name, run.summary["calibration"][k]) for name, k in rows.items())
        ]
    )  # fmt: skip


def length_figure(run: Run) -> None:
    """Score against length, and accuracy by which reply is the longer one."""
    pairs = run.arrays("test_pairs")
    figure, axes = panels(2, height=3.0)
    for name, colour, marker in (("chosen", BLUE, "o"), ("rejected", ORANGE, "^")):
        axes[0].scatter(
            pairs[f"{name}_tokens"], pairs[name], s=6, alpha=0.4,
            color=colour, marker=marker, label=name, rasterized=True,
        )  # fmt: skip
    axes[0].set(xlabel="length of the reply (tokens)", ylabel="raw score")
    for handle in axes[0].legend(markerscale=2).legend_handles:
        handle.set_alpha(1)
    columns = {name: own["accuracy_by_length"] for name, own in predictor_results(run).items()}
    draw_accuracies(axes[1], columns)
    axes[1].set(xlabel="accuracy", ylabel="the preferred reply is")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def surest_mistakes(run: Run) -> list[str]:
    """Markdown of the pairs on which the model was most sure of the wrong reply."""
    texts = {row["mistake"]: row for row in run.samples() if "prompt" in row}
    blocks = []
    for own in run.summary["mistakes"]:
        post = f"Post {escape(str(own['post']))} ({escape(str(own['domain']))})"
        blocks.append(f"**{post}**: {own['confidence']:.0%} sure of the wrong reply.")
        text = texts.get(own["pair"])
        blocks += [quote(excerpt(text["prompt"]))] if text else []
        for name, by_whom in (("rejected", "by the model"), ("chosen", "in the data")):
            numbers = f"score {own[name]:.2f}, {own[f'{name}_tokens']} tokens"
            head = f"*Preferred {by_whom}* ({numbers})"
            blocks.append(quote(excerpt(text[name]), head=f"{head}:") if text else head)
    return blocks or ["The model made none."]


def excerpt(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST_EXCERPT else f"{text[:LONGEST_EXCERPT]} […]"


def accuracy_gain_reading(own: Mapping[str, Any]) -> str:
    """Whether the model orders more pairs rightly than a baseline does."""
    gain = own["gain"]
    value, low, high = (f"{100 * gain[name]:+.1f}" for name in ("value", "low", "high"))
    verdict = by_sign(
        gain, "better than chance explains", "worse than chance explains",
        "which chance alone may explain",
    )  # fmt: skip
    return f"{value} points [{low}, {high}], {verdict}"


def repeats() -> list[Run]:
    """The committed trainings of the assignment's length: one recipe, one seed, two machines."""
    paths = [*RESULTS.glob("repeats/reward-*"), *RESULTS.glob("assignment/reward-*")]
    return sorted(map(Run, paths), key=lambda run: run.record["started"])


def repeats_table(runs: Sequence[Run]) -> pd.DataFrame:
    """What each of some trainings reached, and when it was at its best."""
    rows = []
    for run in runs:
        summary = run.summary
        longer = summary["baselines"]["longer"]
        rows.append(
            {
                "machine": run.record["device"].removeprefix("gpu: "),
                "numerics": run.record["numerics"],
                "best step": f"{summary['best']['step']:,} of {summary['steps']:,}",
                "validation loss": summary["best"]["loss"],
                "accuracy": percent_with_interval(summary["accuracy"]),
                "more than the longer reply": accuracy_gain_reading(longer),
            }
        )
    return pd.DataFrame(rows)


def loss_example(run: Run) -> str:
    """The loss of the first held-out pair, worked out with the numbers as they are printed."""
    pairs, margin = run.arrays("test_pairs"), run.config["margin"]
    chosen, rejected = (round(float(pairs[name][0]), 2) for name in ("chosen", "rejected"))
    loss = max(0.0, margin - (chosen - rejected))
    return f"max(0, {margin:g} - ({chosen:.2f} - ({rejected:.2f}))) = {loss:.2f}"


def groups_reading(run: Run) -> str:
    """What the groups are that the pairs are divided into."""
    if not run.summary.get("accuracy_by_grade"):
        return "The groups are the data's own domains."
    return (
        "Grades say how the worse answer was made: easy, the documentation of another topic; hard, "
        "that of a neighbour in the same module; medium, the right one cut off or with its words "
        "shuffled; partial, the right one cut off preferred to one about another topic."
    )


def temperature_reading(run: Run) -> str:
    """What the temperature, fitted on the validation pairs, did to the held-out log loss."""
    before, after = (run.summary["calibration"][when]["log_loss"] for when in ("before", "after"))
    text = f"The log loss goes from {before:.3f} to {after:.3f}: "
    if f"{before:.3f}" == f"{after:.3f}":
        return text + "on the held-out pairs the temperature changes nothing that can be seen."
    if after < before:
        return text + "on the held-out pairs the temperature helps."
    return (
        text + "on the held-out pairs the temperature makes it worse, since what fits the "
        "validation pairs best need not fit others."
    )


def calibration_reading(run: Run) -> str:
    """Whether the fitted confidence can be told from a calibrated one."""
    own = run.summary["calibration"]["after"]
    text = f"{own['error']:.3f}, where a perfectly calibrated model would show"
    return f"{text} {own['error_by_chance']:.3f} on average on so few pairs"
