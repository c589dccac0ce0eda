"""What the chapters show as tables: data frames made from runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiment_runs.files import read_json
from experiment_runs.run import Run, code_changed_since
from experiment_runs.settings import PROJECT

NAMES = {
    "pretrained": "pretrained",
    "ppo-full": "PPO, full",
    "ppo-lora": "PPO, LoRA",
    "ppo-lora-everywhere": "PPO, LoRA everywhere",
}
BAND = (0.02, 0.1)  # nats per token, where the protocol wants the KL to the reference


def interval(own: Mapping[str, float], digits: int = 3) -> str:
    """An estimate with its 95 % interval, for prose and tables; a dash where there is none."""
    if own["value"] is None:
        return "–"
    return f"{own['value']:.{digits}f} [{own['low']:.{digits}f}, {own['high']:.{digits}f}]"


def percent(own: Mapping[str, float]) -> str:
    """A share with its 95 % interval, in per cent."""
    return f"{own['value']:.1%} [{own['low']:.1%}, {own['high']:.1%}]"


def sources(run: Run, gan: Run) -> pd.DataFrame:
    """Model, texts and images: what was read, and from where."""
    model = run.about["model"]
    rows = {"model": f"{model['name']} ({model['file']}, {model['dtype']})"}
    for what in ("preferences", "prompts"):
        own = run.about[what]
        about = filter(None, [f"{own['rows']:,} rows", own["note"]])
        rows[what] = f"{own['name']} ({own['kind']}): {'; '.join(about)}"
    rows["images"] = gan.summary["source"]
    return pd.DataFrame(rows.items(), columns=["what", "which"])


def licences(run: Run) -> pd.DataFrame:
    """Under what terms the texts may be used."""
    rows = {what: run.about[what]["licence"] for what in ("preferences", "prompts")}
    return pd.DataFrame(rows.items(), columns=["texts", "licence"])


def standing_in(run: Run) -> str:
    """The sentence of the first page that says what is not the protocol's own data."""
    names = [what for what in ("preferences", "prompts") if run.about[what]["kind"] == "stand-in"]
    if not names:
        return "Model and data are those named in the table."
    return (
        f"The {' and '.join(names)} are a stand-in made from the documentation of installed Python "
        "packages, because neither a local copy nor the hub was at hand: real English, but not "
        "human votes and not people's questions."
    )


def cuts(run: Run) -> pd.DataFrame:
    """How many posts and pairs there are in each part, and what was cut to fit."""
    rows = []
    for part, fit in run.summary["fit"].items():
        rows.append(
            {
                "part": part, "posts": fit["posts"], "pairs": fit["pairs"],
                "prompts cut": fit["prompts_cut"], "tokens cut": fit["tokens_cut"],
                "replies too long": fit["replies_dropped"], "pairs lost": fit["pairs_dropped"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def first_rows(run: Run, columns: Sequence[str], count: int = 8) -> pd.DataFrame:
    """The beginning of a training log."""
    metrics = run.metrics()
    return metrics[[name for name in columns if name in metrics]].head(count)


def last_samples(run: Run, count: int = 3) -> list[dict[str, Any]]:
    """The episodes that were kept last."""
    return run.samples()[-count:]


def policies(run: Run) -> pd.DataFrame:
    """Every policy on the unseen prompts."""
    rows = []
    for name, own in run.summary["policies"].items():
        rows.append(
            {
                "policy": policy_name(name), "mean reward": interval(own["reward"], 2),
                "by the second judge": interval(own["gold"], 2),
                "KL per token": own["kl_per_token"], "KL per response": own["kl_per_sequence"],
                "tokens": own["tokens"], "ended": f"{own['ended']:.0%}",
                "empty": f"{own['empty']:.0%}", "distinct-2": own["distinct_2"],
                "repeated": f"{own['repetition']:.0%}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def gains(run: Run) -> pd.DataFrame:
    """The tuned policies against the pretrained one, prompt by prompt, and means over seeds."""
    rows, summary = [], run.summary
    named = [(policy_name(name), own) for name, own in summary["gains"].items()]
    named += [(f"{NAMES[name]}, mean of seeds", own) for name, own in summary["variants"].items()]
    for name, own in named:
        rows.append(
            {
                "policy": name, "gain": interval(own["reward"], 2),
                "by the second judge": interval(own["gold"], 2),
                "wins / ties / losses": f"{own['wins']} / {own['ties']} / {own['losses']}",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def length_explains(run: Run) -> pd.DataFrame:
    """How much of each gain is left between responses of like length, and what share length
    explains, where there is a gain to explain."""
    rows = []
    for name, own in run.summary["gains"].items():
        rows.append(
            {
                "policy": policy_name(name), "change in tokens": interval(own["tokens"], 1),
                "gain": own["reward"]["value"],
                "linear in length": interval(own["length_controlled"], 2),
                "within classes": interval(own["stratified"], 2),
                "explained by length": explained_share(own),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def explained_share(own: Mapping[str, Mapping[str, float]]) -> str:
    """The share of a gain that is gone at equal length; a dash where the gain may be zero."""
    gain = own["reward"]
    if gain["low"] <= 0 <= gain["high"]:
        return "–"
    return f"{1 - own['length_controlled']['value'] / gain['value']:.0%}"


def policy_name(stage: str) -> str:
    """How a policy is called: the stage "ppo-lora-1" is LoRA with the next seed."""
    seed = stage.removeprefix(variant(stage)).removeprefix("-")
    return NAMES[variant(stage)] + (f", seed {seed}" if seed else "")


def variant(stage: str) -> str:
    """The stage of which this one repeats the training with another seed; mostly itself."""
    return stage if stage in NAMES else stage.rpartition("-")[0]


def gain_reading(own: Mapping[str, Any]) -> str:
    """What an interval of a gain allows to say."""
    low, high = own["reward"]["low"], own["reward"]["high"]
    if low > 0:
        return "higher than the pretrained policy's, beyond what chance explains"
    if high < 0:
        return "lower than the pretrained policy's, beyond what chance explains"
    return "not distinguishable from the pretrained policy's with so many prompts"


def seeds_reading(summary: Mapping[str, Any]) -> str:
    """What the runs of each variant with different seeds say together, from an evaluation."""
    parts = []
    for name, own in summary["variants"].items():
        values = [
            gain["reward"]["value"]
            for run, gain in summary["gains"].items()
            if variant(run) == name
        ]
        parts.append(
            f"{NAMES[name]}: {min(values):.2f} to {max(values):.2f} with {len(values)} seeds, "
            f"{interval(own['reward'], 2)} their mean"
        )
    return f"Gains: {'; '.join(parts)}." if parts else "Each variant was trained with one seed."


def penalty_reading(run: Run) -> str:
    """What a response pays for being cut off."""
    penalty = run.config["missing_end_penalty"]
    if penalty == 0:
        return "A response that was cut off pays nothing for it here."
    return (
        f"A response that was cut off, without an end token, has its $r(x, y)$ cut by {penalty:g}."
    )


def kl_control(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Where each run's KL per token ended and how long it was inside the band."""
    rows = []
    for name, run in runs.items():
        metrics = run.metrics()
        inside = metrics["kl"].between(*BAND)
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
    inside = metrics["kl"].between(*BAND)
    last = metrics["kl"].iloc[-1]
    where = "below" if last < BAND[0] else "above" if last > BAND[1] else "inside"
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


def trouble_reading(runs: Mapping[str, Run], gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Of each run that gained nothing for certain or left the band: what its log shows of why."""
    texts = []
    for name, run in runs.items():
        metrics, gain = run.metrics(), gains[name]["reward"]
        final = metrics.iloc[-1]
        if gain["low"] > 0 and BAND[0] <= final["kl"] <= BAND[1]:
            continue
        text = f"{policy_name(name)}: gain {interval(gain, 2)}, KL {final['kl']:.3f} nats a token"
        above = metrics["kl"] > BAND[1]
        text += (
            f", above the band from step {metrics['step'][above.idxmax()]}" if above.any() else ""
        )
        price, spread = final["kl_weight"] * final["kl_sequence"], final["reward_std"]
        text += (
            f". At the end a response paid {price:.2f} for its KL, where the rewards of a batch "
            f"had a standard deviation of {spread:.2f}"
        )
        text += ": the penalty outweighs the reward." if price > spread else "."
        texts.append(text)
    return "\n".join(f"* {text}" for text in texts) or "None did."


def dropout_reading(run: Run) -> str:
    """What dropout in the updates does to ratios that would be 1."""
    later = run.metrics().iloc[1:]
    error, kl = later["first_ratio_error"].median(), later["first_approx_kl"].median()
    return (
        f"the ratios of an update's first pass differ from 1 by {error:.3f} "
        f"(an approximate KL of {kl:.1e})"
    )


def parameters(counts: Mapping[str, int]) -> pd.DataFrame:
    """Numbers in each part of a model; layers of one kind together."""
    rows = [{"part": name, "parameters": count} for name, count in counts.items()]
    return pd.DataFrame([*rows, {"part": "together", "parameters": sum(counts.values())}])


def settings(config: Mapping[str, Any]) -> pd.DataFrame:
    """A configuration as rows."""
    values = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in config.items()}
    return pd.DataFrame(values.items(), columns=["setting", "value"])


def environment(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Where every number of the report comes from."""
    rows = []
    for name, run in runs.items():
        record = run.record
        rows.append(
            {
                "stage": name, "run": run.path.name, "code": record["git"],
                "made on": record["device"], "started": record["started"],
                "code since": "changed" if code_changed_since(run) else "the same",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def packages(run: Run) -> pd.DataFrame:
    """Versions that made a run."""
    rows = {"python": run.record["python"], **run.record["packages"]}
    return pd.DataFrame([{"package": name, "version": value} for name, value in rows.items()])


def invariants(runs: Mapping[str, Run]) -> pd.DataFrame:
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


def tested_invariants() -> pd.DataFrame:
    """What the tests measured of the invariants, on small models: see `make invariants`."""
    rows = read_json(PROJECT / "results" / "measured" / "invariants.json")
    numbers = {name: [f"{row[name]:.1g}" for row in rows] for name in ("measured", "at most")}
    return pd.DataFrame({"invariant": [row["invariant"] for row in rows], **numbers})


def protocol(reward: Run, full: Run, lora: Run, evaluation: Run) -> pd.DataFrame:
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
    return explained(rows)


def explained(rows: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Rows of a protocol; where its value is the one used there is nothing to explain."""
    frame = pd.DataFrame(rows, columns=["setting", "protocol", "here", "why"])
    frame.loc[frame["protocol"] == frame["here"], "why"] = "–"
    return frame


def gan_protocol(run: Run) -> pd.DataFrame:
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
    return explained(rows)
