"""The appendix: protocol and departures, invariants, models, and where every number comes from."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiment_runs.run import Run, code_since
from experiment_runs.settings import PROJECT
from rlhf_report.style import policy_name


def parameters_table(counts: Mapping[str, int]) -> pd.DataFrame:
    """Numbers in each part of a model; layers of one kind together."""
    rows = [{"part": name, "parameters": count} for name, count in counts.items()]
    return pd.DataFrame([*rows, {"part": "together", "parameters": sum(counts.values())}])


def settings_table(config: Mapping[str, Any]) -> pd.DataFrame:
    """A configuration as rows."""
    values = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in config.items()}
    return pd.DataFrame(values.items(), columns=["setting", "value"])


def runs_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Where every number of the report comes from."""
    rows = []
    for name, run in runs.items():
        record = run.record
        rows.append(
            {
                "stage": name, "run": run.path.name, "code": record["git"],
                "made on": record["device"], "started": record["started"],
                "code since": code_since(run),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def packages_table(run: Run) -> pd.DataFrame:
    """Versions that made a run."""
    rows = {"python": run.record["python"], **run.record["packages"]}
    return pd.DataFrame([{"package": name, "version": value} for name, value in rows.items()])


def invariants_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """What must be zero before the first update, as measured in these very runs; and how far the
    logprobs of the sampler are from those of the update."""
    columns = {
        "first_ratio_error": "ratio minus 1",
        "first_approx_kl": "approximate KL",
        "kl": "KL to the reference",
        "kl_k3": "k3 estimate of it",
        "logprob_error": "logprobs, sampled to scored",
    }
    first = pd.DataFrame({policy_name(name): run.metrics().iloc[0] for name, run in runs.items()})
    kept = [name for name in columns if name in first.index]
    rows = first.loc[kept].T.astype(float).map("{:.1g}".format)
    return rows.rename(columns=columns).rename_axis("policy").reset_index()


def tested_invariants_table() -> pd.DataFrame:
    """What the tests measured of the invariants, on small models: see `make invariants`."""
    rows = json.loads((PROJECT / "results" / "measured" / "invariants.json").read_text())
    numbers = {name: [f"{row[name]:.1g}" for row in rows] for name in ("measured", "at most")}
    return pd.DataFrame({"invariant": [row["invariant"] for row in rows], **numbers})


def protocol_table(reward: Run, full: Run, lora: Run, evaluation: Run) -> pd.DataFrame:
    """The protocol's values, the values of these runs, and why they differ."""
    r, f, a, e = reward.config, full.config, lora.config, evaluation.config
    budget = "budget of the profile"
    small = "so few updates move nothing at the protocol's rate"
    pairs = reward.summary["pairs"]["train"]
    adapter = a["lora"]
    rows = [
        ("framework", "TRL", "JAX", "TRL's PPO was removed in 2026 (pull request 7020)"),
        ("preferences", "stanfordnlp/SHP", reward.about["preferences"]["name"], "what was at hand"),
        ("prompts (prompter's)", "OpenAssistant/oasst1", full.about["prompts"]["name"],
         "what was at hand"),
        ("training pairs", "at least 5,000", f"{pairs:,}", budget if pairs < 5000 else "–"),
        ("reward loss", "pairwise margin ranking", r["loss"], ""),
        ("reward learning rate", "5e-05", f"{r['learning_rate']:.0e}", small),
        ("reward batch (pairs)", "8", str(r["batch_pairs"]), "whole posts in one pass"),
        ("reward epochs", "5", str(r["epochs"]), budget),
        ("prompts for PPO", "2,000", f"{full.summary['prompts']:,}", budget),
        ("PPO learning rate, full", "1e-05", f"{f['learning_rate']:.0e}", small),
        ("PPO learning rate, LoRA", "1e-05", f"{a['learning_rate']:.0e}", small),
        ("PPO batch / forward batch", "64 / 16", f"{f['batch']} / {f['forward_batch']}", budget),
        ("passes over the prompts", "5", str(f["passes"]), budget),
        ("inner epochs a batch", "4", str(f["inner_epochs"]), budget),
        ("prompt tokens", "256", str(f["prompt_tokens"]), budget),
        ("response tokens", "128", str(f["response_tokens"]), budget),
        ("KL per token", "0.02 to 0.1", f"controlled to {f['target_kl']}", ""),
        ("LoRA targets", "q_proj, v_proj", ", ".join(adapter["targets"]), ""),
        ("LoRA rank / alpha", "4-16 / 32", f"{adapter['rank']} / {adapter['alpha']:.0f}", ""),
        ("LoRA dropout", "0.2", str(adapter["dropout"]), "in updates only"),
        ("trained with LoRA", "only LoRA", "LoRA and the value head", "PPO needs a critic"),
        ("unseen prompts", "at least 50", str(e["prompts"]), ""),
    ]  # fmt: skip
    return departures(rows)


def departures(rows: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Rows of a protocol; where its value is the one used there is nothing to explain."""
    frame = pd.DataFrame(rows, columns=["setting", "protocol", "here", "why"])
    frame.loc[frame["protocol"] == frame["here"], "why"] = "–"
    return frame


def gan_protocol_table(run: Run) -> pd.DataFrame:
    """The same for the DCGAN."""
    cfg = run.config
    epochs = run.metrics()["epoch"].iloc[-1]
    rows = [
        ("data", "DermaMNIST or ChestMNIST", run.summary["source"], "what was at hand"),
        ("epochs", "1000", f"{epochs:.4g}", "budget of the profile"),
        ("generator widths", "512, 256, 128, 64", ", ".join(map(str, cfg["widths"])),
         "budget of the profile"),
        ("Adam", "2e-04, beta 0.5, 0.999",
         f"{cfg['learning_rate']:.0e}, beta {cfg['momentum']}, {cfg['variance_decay']}", ""),
        ("batch", "64", str(cfg["batch"]), ""),
        ("grid", "8 x 4", "8 x 4", ""),
    ]  # fmt: skip
    return departures(rows)
