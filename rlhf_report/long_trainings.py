"""The committed DCGANs of the assignment's length, and attempts at a cure, beside each other."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiment_runs.run import Run
from experiment_runs.settings import RESULTS
from gan_jax.calibration import BLURRED
from rlhf_report.mode_collapse import GENERATED, REAL
from rlhf_report.style import mean_with_interval

MATCHED = RESULTS / "measured" / "matched_blur.json"
MOST = 0.5  # share of images with a twin above which a training counts as collapsed


def committed() -> dict[str, Run]:
    """The committed trainings of the assignment's length and of attempts at a cure, by name."""
    paths = sorted([*RESULTS.glob("assignment/gan-*"), *RESULTS.glob("collapse/gan-*")])
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


def matched_blur() -> dict[str, Any]:
    """By the folder of a training: what the detectors find on real images that are blurred until
    they have its FID (benchmarks/matched_blur.py)."""
    return json.loads(MATCHED.read_text())


def table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Detectors of the long trainings' images, of real ones, and of real ones that are as far
    from real ones as those of each training, with 95 % intervals."""
    first, blurred = next(iter(runs.values())), matched_blur()
    rows = [row("real images", first.summary, REAL)]
    for name, run in runs.items():
        rows.append(row(name, run.summary, GENERATED))
        rows.append(row("real, blurred to the same FID", blurred[run.path.name], BLURRED))
    return pd.DataFrame(rows)


def reading(runs: Mapping[str, Run], blurred: Mapping[str, Any]) -> str:
    """Which long trainings have collapsed: most of their images have a twin, and more than of real
    images that are blurred until they have the same FID."""
    sentences = []
    for name, run in runs.items():
        twins = by_detector(run.summary, GENERATED)["twins"]
        blur = by_detector(blurred[run.path.name], BLURRED)["twins"]
        if twins["low"] <= blur["high"]:
            verdict = "no more than blur makes"
        elif twins["mean"] > MOST:
            verdict = "the training has collapsed"
        else:
            verdict = "variety is lost"
        sentences.append(f"of “{name}” {twins['mean']:.0%} ({blur['mean']:.0%}), {verdict}")
    return (
        "The share of images that have a twin, in brackets that of real images blurred to the "
        f"same FID: {'; '.join(sentences)}."
    )


def by_detector(found: Mapping[str, Any], scenario: str) -> dict[str, Mapping[str, Any]]:
    """What every detector found in one scenario."""
    return {row["detector"]: row for row in found["detectors"] if row["scenario"] == scenario}


def row(name: str, summary: Mapping[str, Any], scenario: str) -> dict[str, str]:
    """What the detectors found in one scenario."""
    found = by_detector(summary, scenario)
    (birthday,) = (row for row in summary["birthday"] if row["scenario"] == scenario)
    support = {name: round(value, -1) for name, value in birthday["support"].items()}
    shown = {name: mean_with_interval(found[name]) for name in ("twins", "recall", "coverage")}
    return {
        "images": name, **shown, "FID": mean_with_interval(found["fid"]),
        "support": "{mean:,.0f} [{low:,.0f}, {high:,.0f}]".format(**support),
    }  # fmt: skip
