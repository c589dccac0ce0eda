"""The appendix: protocol and departures, invariants, models, and where every number comes from."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Image, Markdown, display

from experiment_runs import assignment
from experiment_runs.inventory import code_since
from experiment_runs.run import Run
from experiment_runs.settings import PROJECT, RESULTS
from rlhf_report.style import policy_name

MEASURED = RESULTS / "measured"
PICTURE_WIDTH = 670  # of a picture as wide as the text, pixels


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


def products_reading(run: Run) -> str:
    """How products of float32 arrays were computed in a run."""
    said = run.record.get("matmul_precision")
    if said is None:
        return "How products of float32 arrays were computed was not recorded in this run."
    if said != "default":
        return f"Products of float32 arrays were computed with JAX's matmul precision “{said}”."
    where = run.record["device"].partition(":")[0]
    if where == "cpu":
        return "Products of float32 arrays were computed in float32."
    return (
        "Products of float32 arrays were computed with JAX's default precision, which is TF32 (ten "
        "bits of mantissa) on NVIDIA cards since Ampere; JAX_DEFAULT_MATMUL_PRECISION=highest asks "
        "for float32."
    )


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
        "logprob_error_mean": "logprobs, sampled to scored: mean",
        "logprob_error_p99": "99th percentile",
        "logprob_error": "largest",
    }
    first = pd.DataFrame({policy_name(name): run.metrics().iloc[0] for name, run in runs.items()})
    kept = [name for name in columns if name in first.index]
    rows = first.loc[kept].T.astype(float).map("{:.1g}".format)
    return rows.rename(columns=columns).rename_axis("policy").reset_index()


def tested_invariants_table() -> pd.DataFrame:
    """What the tests measured of the invariants, on small models: see `make invariants`."""
    rows = json.loads((MEASURED / "invariants.json").read_text())
    numbers = {name: [f"{row[name]:.1g}" for row in rows] for name in ("measured", "at most")}
    return pd.DataFrame({"invariant": [row["invariant"] for row in rows], **numbers})


def speed_table() -> pd.DataFrame:
    """How fast this project and PyTorch were: the first table that `make bench` has written."""
    lines = (MEASURED / "bench.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    head, _, *cells = ([cell.strip() for cell in row.strip("| ").split("|")] for row in rows)
    frame = pd.DataFrame(cells, columns=head)
    return frame.loc[:, (frame != "-").any()]  # without sides that took no turn


def machine(name: str) -> str:
    """What a measurement was made on, in a sentence."""
    told = re.search(r"machine +(.+?), load", (MEASURED / name).read_text())
    return f"Measured on {told[1]}."


def measured_picture(name: str) -> None:
    """Shows a picture that a benchmark has drawn."""
    display(Image((MEASURED / name).read_bytes(), format="png", width=PICTURE_WIDTH))


def exercises() -> Markdown:
    """Invariants to break by hand, one line of code each, and the test that then goes red."""
    return Markdown(
        "\n".join(
            f"1. {own['invariant']} In `{own['file']}` replace `{own['before']}` by "
            f"`{own['after']}`: `{own['test'].split('::')[1]}` goes red."
            for own in assignment.ASSIGNMENT.get("exercise", [])
        )
    )


def faults_table() -> pd.DataFrame:
    """What happens when something goes wrong, and the test that shows it."""
    return pd.read_csv(PROJECT / "tests" / "faults.csv")


def protocol_table(reward: Run, full: Run, lora: Run, evaluation: Run) -> pd.DataFrame:
    """The protocol's values (assignment.toml), the values of these runs, and why they differ."""
    r, f, a, e = reward.config, full.config, lora.config, evaluation.config
    budget = "budget of the profile"
    enough = reward.summary["pairs"]["train"] >= (r["train_pairs"] or math.inf)
    pairs = budget if enough else "the data hold no more"
    small = "so few updates move nothing at the protocol's rate"
    data = assignment.PROTOCOL["data"]
    parts = {"reward": r | {"train_pairs": reward.summary["pairs"]["train"]}, "evaluation": e}
    parts |= {"ppo": f | {"prompts": full.summary["prompts"]}, "lora": a["lora"]}
    rows = [
        ("framework", "TRL", "JAX", "TRL's PPO was removed in 2026 (pull request 7020)"),
        ("preferences", data["preferences"], reward.about["preferences"]["name"],
         "what was at hand"),
        ("prompts (prompter's)", data["prompts"], full.about["prompts"]["name"],
         "what was at hand"),
        compared("training pairs", parts, "reward", "train_pairs", pairs),
        compared("reward loss", parts, "reward", "loss"),
        compared("reward learning rate", parts, "reward", "learning_rate", small),
        compared("reward batch (pairs)", parts, "reward", "batch_pairs", "whole posts in one pass"),
        compared("reward epochs", parts, "reward", "epochs", budget),
        compared("prompts for PPO", parts, "ppo", "prompts", budget),
        compared("PPO learning rate, full", parts, "ppo", "learning_rate", small),
        compared("PPO learning rate, LoRA", {"ppo": a}, "ppo", "learning_rate", small),
        compared("PPO batch", parts, "ppo", "batch", budget),
        compared("PPO forward batch", parts, "ppo", "forward_batch", budget),
        compared("passes over the prompts", parts, "ppo", "passes", budget),
        compared("inner epochs a batch", parts, "ppo", "inner_epochs", budget),
        compared("prompt tokens", parts, "ppo", "prompt_tokens", budget),
        compared("response tokens", parts, "ppo", "response_tokens", budget),
        ("KL per token", "{} to {}".format(*assignment.KL_BAND),
         f"controlled to {f['target_kl']}", ""),
        compared("LoRA targets", parts, "lora", "targets"),
        compared("LoRA rank", parts, "lora", "rank"),
        compared("LoRA alpha", parts, "lora", "alpha"),
        compared("LoRA dropout", parts, "lora", "dropout", "in updates only"),
        ("trained with LoRA", "only LoRA", "LoRA and the value head", "PPO needs a critic"),
        compared("unseen prompts", parts, "evaluation", "prompts", budget),
    ]  # fmt: skip
    return departures(rows)


def compared(
    setting: str, parts: Mapping[str, Mapping[str, Any]], part: str, field: str, why: str = ""
) -> tuple[str, str, str, str]:
    """A row of a protocol: what is asked for, what was done, and why where that is a departure."""
    value = parts[part][field]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else assignment.in_words(value)
    kept = not assignment.departures(part, {field: value}, [field])
    return setting, assignment.wanted(part, field), shown, "" if kept else why


def departures(rows: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Rows of a protocol; where what it asks for was done there is nothing to explain."""
    frame = pd.DataFrame(rows, columns=["setting", "protocol", "here", "why"])
    kept = (frame["protocol"] == frame["here"]) | (frame["why"] == "")
    return frame.assign(why=frame["why"].mask(kept, "–"))


def gan_protocol_table(run: Run) -> pd.DataFrame:
    """The same for the DCGAN."""
    parts = {"gan": run.config | {"epochs": float(f"{run.metrics()['epoch'].iloc[-1]:.4g}")}}
    budget = "budget of the profile"
    rows = [
        ("data", "DermaMNIST or ChestMNIST", run.summary["source"], "what was at hand"),
        compared("epochs", parts, "gan", "epochs", budget),
        compared("generator widths", parts, "gan", "widths", budget),
        compared("Adam's learning rate", parts, "gan", "learning_rate"),
        compared("Adam's first decay", parts, "gan", "momentum"),
        compared("Adam's second decay", parts, "gan", "variance_decay"),
        compared("batch", parts, "gan", "batch"),
        ("grid", "8 x 4", "8 x 4", ""),
    ]
    return departures(rows)
