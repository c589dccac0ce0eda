"""What PPO is compared with in the chapter on evaluation: best of n, DPO, and no critic."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiment_runs.run import Run
from rlhf_jax.experiment import Experiment
from rlhf_report.style import by_sign, listed, policy_name, with_interval


def best_of_n_table(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Each tuned policy beside the best of n at no greater distance."""
    return pd.DataFrame(
        {
            "policy": policy_name(name),
            "KL per response": summary["policies"][name]["kl_per_sequence"],
            "best of": against["n"],
            "its KL, at most": against["kl_per_sequence"],
            "reward less the best's": with_interval(against["reward"], 2),
            "by the second model": with_interval(against["second_reward"], 2),
        }
        for name, own in summary["gains"].items()
        for against in [own["best_of_n"]]
    )


def best_of_n_reading(summary: Mapping[str, Any]) -> str:
    """Which tuned policies are worth more than choosing among samples."""
    verdicts: dict[str, list[str]] = {}
    for name, own in summary["gains"].items():
        ahead = own["best_of_n"]["reward"]
        verdict = by_sign(ahead, "ahead of", "behind", "not to be told from")
        verdicts.setdefault(verdict, []).append(policy_name(name))
    total = len(summary["gains"])
    told = "; ".join(
        f"{listed(names) if len(names) < 3 else f'{len(names)} of {total} policies'} "
        f"{'is' if len(names) == 1 else 'are'} {verdict} it"
        for verdict, names in verdicts.items()
    )
    return f"Beside the best of n at no greater distance, by the reward that both go by: {told}."


def dpo_reading(experiment: Experiment) -> str:
    """How DPO was trained and how well it orders pairs, where it was."""
    if not experiment.baselines:
        return "DPO was not trained beside these runs."
    run = experiment.run("dpo")
    pairs, found = run.summary["pairs"], run.summary["validation"]
    return (
        f"DPO took {run.summary['steps']} steps on {pairs['train']} pairs and then orders "
        f"{found['accuracy']:.0%} of {pairs['validation']} held-out ones by its own log-ratios."
    )


def critic_free_reading(runs: Mapping[str, Run]) -> str:
    """How the policies without a critic were trained, where there are any."""
    told = [
        f"{policy_name(name)}: {run.config['responses_per_prompt']} responses to each of "
        f"{run.config['prompts']} prompts, {run.summary['steps']} steps"
        for name, run in runs.items()
        if run.config["advantages"] != "gae"
    ]
    return "; ".join(told) + "." if told else "No policy without a critic stands beside these runs."
