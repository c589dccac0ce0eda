"""The committed trial of four settings of the LoRA variant: examples/gentler_settings.py."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiment_runs.inventory import find
from experiment_runs.run import Run
from experiment_runs.settings import RESULTS
from rlhf_jax.intervals import Interval, bootstrap
from rlhf_jax.ratings.rater_agreement import by_model, mean_scores
from rlhf_jax.ratings.store import RATINGS, load_ratings
from rlhf_report.style import by_sign, listed, policy_name, with_interval

WORDS = {
    "target_kl": "KL target {:g}", "learning_rate": "rate {:g}", "response_tokens": "{} tokens",
    "temperature": "trained at {:g}",
}  # fmt: skip


def evaluations() -> list[Run]:
    """The evaluations of the trial, the one at the higher temperature first."""
    found = map(Run, (RESULTS / "gentler").glob("evaluate-*"))
    return sorted(found, key=lambda run: -run.config["temperature"])


def setting(run: Run, name: str) -> str:
    """A policy of an evaluation by what sets it apart from the variant as the profile has it, and
    the temperature of its samples where that is not 1."""
    words = []
    if name != "pretrained":
        (path,) = RESULTS.glob(f"*/{name}-{run.record['inputs'][name][:10]}")
        cfg, base = Run(path).config, find("ppo-lora", RESULTS / "reference").config
        if cfg["lora"]:
            changed = [field for field in WORDS if cfg[field] != base[field]]
            words = ["LoRA", *(WORDS[field].format(cfg[field]) for field in changed)]
    temperature = run.config["temperature"]
    named = ", ".join(words) or policy_name(name)
    return named if temperature == 1 else f"{named}, at {temperature:g}"


def rating_changes(run: Run) -> dict[str, tuple[float, Interval | None]]:
    """By policy, the mean rating and its change from the pretrained one, prompt by prompt; those
    that were not rated are left out."""
    responses = run.samples()
    scores = by_model(mean_scores(responses, load_ratings(run.path / RATINGS, responses)))
    base, found = scores.get("pretrained", {}), {}
    for name, own in scores.items():
        both = sorted(own.keys() & base.keys())
        change = bootstrap(np.array([own[prompt] - base[prompt] for prompt in both]))
        found[name] = np.mean([*own.values()]), None if name == "pretrained" else change
    return found


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """Every policy of the trial: gains over the pretrained policy at the same temperature,
    distance, and the ratings, with paired 95 % intervals."""
    rows = []
    for run in runs:
        rated = rating_changes(run)
        for name, own in run.summary["policies"].items():
            gain = run.summary["gains"].get(name)
            rating, change = rated.get(name, (np.nan, None))
            rows.append(
                {
                    "policy": setting(run, name),
                    "gain in reward": with_interval(gain["reward"], 2) if gain else "–",
                    "by the second": with_interval(gain["second_reward"], 2) if gain else "–",
                    "KL": own["kl_per_sequence"], "perplexity": own["perplexity"],
                    "rating": rating,
                    "change": with_interval(change._asdict(), 2) if change else "–",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def reading(runs: Sequence[Run]) -> str:
    """Which policies are rated below the pretrained one at the same temperature."""
    verdicts: dict[str, list[str]] = {}
    for run in runs:
        for name, (_, change) in rating_changes(run).items():
            if change:
                verdict = by_sign(change._asdict(), "above", "below", "not to be told from")
                verdicts.setdefault(verdict, []).append(f"“{setting(run, name)}”")
    told = "; ".join(f"{verdict} it: {listed(names)}" for verdict, names in verdicts.items())
    return f"Beside the pretrained policy at the same temperature, by the mean rating: {told}."


def raters_reading(runs: Sequence[Run]) -> str:
    """How many responses were rated, and by whom."""
    given = [rating for run in runs for rating in load_ratings(run.path / RATINGS)]
    kinds = {"ai": "an AI system", "person": "people"}
    by = listed(kinds[kind] for kind in sorted({rating.rater_kind for rating in given}))
    return f"{len(given)} responses were rated blind, in random order, by {by or 'nobody yet'}."
