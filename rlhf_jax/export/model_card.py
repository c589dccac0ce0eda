"""The README.md of an export: what it is, how it was trained, how to use it, what it cannot do."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from experiment_runs.run import Run
from rlhf_jax.pretrained.tokenizer import Tokenizer

BASE_FOLDER = (
    " The folder `base` holds the very weights that it was trained on; adapter_config.json "
    "names it by its place on the disk, change that when you move the two."
)
REWARD_LIMITS = (
    "It reads one question and one answer, as above; other templates and longer conversations are "
    "outside what it was trained on.",
    "A score compares answers to the same question. It says nothing of truth or safety: it was "
    "learnt from pairs, of which one was preferred.",
    "The output head of this layout has no bias, so that the centre of the reward stays in "
    "`reward_offset` of config.json: subtract it, or compare differences only.",
)
POLICY_LIMITS = (
    "It was trained to please one reward model within short answers; what that model overlooks or "
    "overrates, it has learnt to exploit. Judge it by people's ratings, not by its reward.",
    "Longer answers tend to be rewarded: compare at equal length.",
    "It knows no more than the model that it started from, and invents as freely.",
    "The value head of the training is not part of the export.",
    "`max_new_tokens` in `generation_config.json` is the length of the training. vLLM's server "
    "takes it as a limit for all requests; `--override-generation-config` raises it.",
)
IN_HALF = (  # of models whose every weight was trained
    "The weights are in float32. Where they are read in half precision, as vLLM does by default, "
    "they are rounded to nearest, and what training moved by less than half of the distance of two "
    "such numbers is lost: `--dtype float32` keeps it.",
)


def reward_card(run: Run, tokenizer: Tokenizer, *, adapter: bool) -> str:
    """The card of a reward model, or of its adapter and head."""
    name, summary = base_name(run), run.summary
    accuracy, longer = summary["accuracy"], summary["baselines"]["longer"]["accuracy"]
    results = {
        "accuracy on held-out pairs": interval(accuracy),
        "accuracy of choosing the longer answer": interval(longer),
        "correlation of the score with length": f"{summary['length_correlation']:.2f}",
    }
    length = (
        f"Length bias: on held-out pairs its score correlates {summary['length_correlation']:.2f} "
        f"with the number of tokens, and always choosing the longer answer would be right in "
        f"{longer['value']:.1%} of them, the model in {accuracy['value']:.1%}."
    )
    header = front_matter(
        run,
        adapter=adapter,
        task="text-classification",
        tags=["reward-model", "rlhf", "jax"],
        metrics={"accuracy": accuracy["value"]},
    )
    what = "Low-rank adapter and head of a reward model" if adapter else "Reward model"
    lead = f"{what} from {name}: one number for an answer, higher is better."
    lead += BASE_FOLDER if adapter else ""
    use = f"""\
{loading_code("AutoModelForSequenceClassification", adapter)}
{prompt_code(tokenizer)}
{text_code(tokenizer)}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
offset = {"base" if adapter else "model"}.config.reward_offset
reward = model(**inputs).logits[0, 0].item() - offset"""
    limits = length, *REWARD_LIMITS, *(() if adapter else IN_HALF)
    return card(header, run, lead, use, results, limits)


def policy_card(run: Run, tokenizer: Tokenizer, *, adapter: bool) -> str:
    """The card of a policy, or of its adapter."""
    name, summary = base_name(run), run.summary
    header = front_matter(
        run,
        adapter=adapter,
        task="text-generation",
        tags=["rlhf", "ppo", "jax"],
        metrics={
            "reward": summary["reward_last_quarter"],
            "kl_per_token": summary["kl_last_quarter"],
        },
    )
    results = {
        "reward in the last quarter of the training, by its own reward model": (
            f"{summary['reward_last_quarter']:.3f}"
        ),
        "KL to the base model there, nats per token": f"{summary['kl_last_quarter']:.4f}",
        "trained parameters": f"{sum(summary['trained_parameters'].values()):,}",
    }
    what = "Low-rank adapter of" if adapter else "Policy from"
    lead = f"{what} {name}, trained by proximal policy optimisation against a reward model."
    lead += BASE_FOLDER if adapter else ""
    use = f"""\
{loading_code("AutoModelForCausalLM", adapter)}
{prompt_code(tokenizer)}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs)"""
    limits = *POLICY_LIMITS, *(() if adapter else IN_HALF)
    return card(header, run, lead, use, results, limits)


def loading_code(kind: str, adapter: bool) -> str:
    """Lines that load an export's tokenizer and model."""
    lines = f"""\
from transformers import {kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
"""
    if not adapter:
        return f"{lines}model = {kind}.from_pretrained(path)"
    return f"""\
from peft import PeftModel
{lines}base = {kind}.from_pretrained(f"{{path}}/base")
model = PeftModel.from_pretrained(base, path)"""


def prompt_code(tokenizer: Tokenizer) -> str:
    """Lines that make of a `question` the `prompt` that the training used."""
    system = '{"role": "system", "content": ""}, ' if tokenizer.template.system else ""
    return f"""\
messages = [{system}{{"role": "user", "content": question}}]
prompt = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
)"""


def text_code(tokenizer: Tokenizer) -> str:
    """The line that adds an `answer` to the `prompt`, up to its end."""
    before, closing = tokenizer.around_reply
    answer = "answer.strip()" if tokenizer.reply.trimmed else "answer"
    return f"text = prompt + {f'{before!r} + ' if before else ''}{answer} + {closing!r}"


def card(
    header: str,
    run: Run,
    lead: str,
    use: str,
    results: Mapping[str, str],
    limits: Sequence[str],
) -> str:
    """A whole README.md."""
    data = [
        f"* {part}: {source['name']} ({source['kind']}), {source['rows']} rows; "
        f"licence: {source['licence']}"
        for part, source in run.about.items()
        if "rows" in source
    ]
    provenance = {name: run.record[name] for name in ("git", "device", "started")}
    provenance |= {"packages": ", ".join(f"{k} {v}" for k, v in run.record["packages"].items())}
    sections = {
        "Use": f"```python\n{use}\n```",
        "Results": table(results),
        "Limits": "\n".join(f"* {limit}" for limit in limits),
        "Data": "\n".join(data) or "not recorded",
        "Hyper-parameters": table(run.config),
        "Provenance": table({"run": f"{run.stage} {run.identity}", **provenance}),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{header}\n---\n\n# {title_of(run)}\n\n{lead}\n\n{body}\n"


def front_matter(
    run: Run, *, adapter: bool, task: str, tags: Sequence[str], metrics: Mapping[str, float]
) -> str:
    """The part of a card that the hub reads."""
    sources = [source for source in run.about.values() if "rows" in source]
    model = run.about.get("model", {}).get("name", "")
    measured_on = run.about.get("prompts" if run.stage.startswith("ppo") else "preferences", {})
    dataset = measured_on.get("name", "not recorded")
    results = [
        EvalResult(
            task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name,
            metric_value=round(float(value), 4),
        )
        for name, value in metrics.items()
    ]  # fmt: skip
    hub = {s["name"] for s in sources if s["kind"] == "hub"}
    return ModelCardData(
        base_model=model if is_hub_id(model) else None,
        datasets=sorted(hub) or None,
        model_name=title_of(run),
        eval_results=results,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        base_model_relation="adapter" if adapter else "finetune",
        tags=[*tags, "lora"] if adapter else [*tags],
    ).to_yaml()


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def base_name(run: Run) -> str:
    """The model that the run started from, without a path of this machine."""
    name = run.about.get("model", {}).get("name", "a random model")
    return name if is_hub_id(name) else Path(name).name


def title_of(run: Run) -> str:
    return f"{base_name(run).split('/')[-1]}-{run.stage}"


def interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} (95 % interval {value['low']:.3f} to {value['high']:.3f})"


def table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
