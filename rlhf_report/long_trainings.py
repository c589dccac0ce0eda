"""The committed DCGANs of the assignment's length, and attempts at a cure, beside each other."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiment_runs import settings
from experiment_runs.run import Run
from rlhf_report.mode_collapse import GENERATED, REAL
from rlhf_report.style import mean_with_interval

BLURRED = "real, blurred"
MOST = 0.5  # share of images with a twin above which a training counts as collapsed


def committed() -> dict[str, Run]:
    """The committed trainings of the assignment's length and of attempts at a cure, by name."""
    results = settings.PROJECT / "results"
    paths = sorted([*results.glob("assignment/gan-*"), *results.glob("collapse/gan-*")])
    return {options_in_words(run): run for run in map(Run, paths)}


def options_in_words(run: Run) -> str:
    """What of a training is not plain, and how long it took."""
    cfg = run.config
    options = [
        "label smoothing" if cfg["label_smoothing"] else "",
        "augmentation" if cfg["augmentation"] else "",
        "spectral norm" if cfg["spectral_norm"] else "",
    ]
    return f"{' and '.join(filter(None, options)) or 'plain'}, {cfg['epochs']:,} epochs"


def table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Detectors of the long trainings' images beside those of real ones, with 95 % intervals."""
    rows = [row("real images", next(iter(runs.values())), REAL)]
    rows.append(row("real images, blurred", with_blurred(runs), BLURRED))
    rows += [row(name, run, GENERATED) for name, run in runs.items()]
    return pd.DataFrame(rows)


def with_blurred(runs: Mapping[str, Run]) -> Run:
    """The training that has blurred real images among its controls."""
    return next(run for run in runs.values() if by_detector(run, BLURRED))


def reading(runs: Mapping[str, Run]) -> str:
    """Which long trainings have collapsed: most of their images have a twin, and more than of real
    images that are merely blurred."""
    blurred = by_detector(with_blurred(runs), BLURRED)["twins"]
    sentences = []
    for name, run in runs.items():
        twins = by_detector(run, GENERATED)["twins"]
        if twins["low"] <= blurred["high"]:
            verdict = "no more than blur makes"
        elif twins["mean"] > MOST:
            verdict = "the training has collapsed"
        else:
            verdict = "variety is lost"
        sentences.append(f"of “{name}” {twins['mean']:.0%}, {verdict}")
    return (
        f"Of real images that are merely blurred {blurred['mean']:.0%} have a twin; "
        f"{'; '.join(sentences)}."
    )


def by_detector(run: Run, scenario: str) -> dict[str, Mapping[str, Any]]:
    """What every detector found in one scenario."""
    return {row["detector"]: row for row in run.summary["detectors"] if row["scenario"] == scenario}


def row(name: str, run: Run, scenario: str) -> dict[str, str]:
    """What the detectors found in one scenario of a training."""
    found = by_detector(run, scenario)
    (birthday,) = (row for row in run.summary["birthday"] if row["scenario"] == scenario)
    support = {name: round(value, -1) for name, value in birthday["support"].items()}
    shown = {name: mean_with_interval(found[name]) for name in ("twins", "recall", "coverage")}
    return {
        "images": name, **shown, "FID": mean_with_interval(found["fid"]),
        "support": "{mean:,.0f} [{low:,.0f}, {high:,.0f}]".format(**support),
    }  # fmt: skip
