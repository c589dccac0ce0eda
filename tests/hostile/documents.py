"""Malformed documents for the renderer, and submissions for `verify`."""

import dataclasses
import json
import random
from pathlib import Path

import nbformat
import typst
from damage import damaged, misplaced, special_file

from experiment_runs.run import NUMERICS, identity_of
from gan_jax.config import PROFILES
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.profiles import profile
from rlhf_report.carried import PLACE, marks
from rlhf_report.submission import ENDINGS
from rlhf_report.verify import RATING_TABLES

DOCUMENT = {
    "_quarto.yml": "project:\n  output-dir: out\nformat:\n  html:\n    toc: true\n  typst:\n"
    "    papersize: a4\n    margin:\n      x: 2cm\nbibliography: references.bib\nlang: en\n",
    "references.bib": "@article{one,\n  title = {One},\n  author = {A. Body},\n  year = 2026\n}\n",
    "report.qmd": "---\ntitle: A title\nauthor: Nobody\ndate: 2026-03-04\n---\n\n"
    "# First {#sec-one}\n\n{{< include part.qmd >}}\n\n@tbl-one, @eq-one and [@one].\n\n"
    "$$ x^2 $$ {#eq-one}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n: A table {#tbl-one}\n\n"
    "::: {#refs}\n:::\n",
    "part.qmd": "::: {.callout-note title=\"A note\"}\nText.\n:::\n\n```python\nx = 1\n```\n",
}  # fmt: skip
LINES = [
    "{{< include report.qmd >}}", "{{< include /dev/zero >}}", "{{< include . >}}", ":::: {.x}",
    "::: {.callout-note}", "```{python", "[@nobody]", "@fig-none", "[@one; @tbl-one]", "---",
    "$$ \\frac{ $$ {#eq-two}", "$$ x $$ {#eq-one}", "![x](/dev/zero){#fig-a}", "$\\foo{$",
    "![x](part.qmd){#fig-b}", "<script>alert(1)</script>", "```{=html}\n<b>\n```",
    "x" * 10**6, "[" * 10**4, "> " * 2000, "$" + "{" * 3000 + "$", "`{python} 1`", "|" * 10**4,
    "{{< video x >}}", "[x]{.y}", "\x00", "\x1b[31m", "date: 2024-13-45", "title: [", "lang: 5",
    "bibliography: 5", "bibliography: /dev/zero", "project: 7", "format: {html: 3}", "toc: {a: 1}",
    "margin: 3", "papersize: x", "title: !!python/object:os.system x", "author: {a: 1}",
    "&a [" + "*a, " * 5 + "]", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "@article{", "}",
    "output-dir: /proc/none", "keywords: 5", "  title = {" + "{" * 3000, "# " * 3000, "* " * 2000,
]  # fmt: skip


def document(folder: Path, rng: random.Random) -> None:
    """A document with a line in the place of another, or a file that is damaged."""
    contents = dict(DOCUMENT)
    name = rng.choice([*contents])
    lines = contents[name].splitlines()
    lines[rng.randrange(len(lines))] = rng.choice(LINES)
    contents[name] = "\n".join(lines)
    for own, text in contents.items():
        content = text.encode()
        broken = own == name and rng.random() < 0.3
        (folder / own).write_bytes(damaged(content, rng) if broken else content)
    if rng.random() < 0.1:
        special_file(folder / rng.choice([*contents]), rng)


def submission(folder: Path, rng: random.Random) -> None:
    """What a student hands in, with a value that is another one, or a file that is damaged."""
    content = carried()
    if rng.random() < 0.6:
        content = misplaced(content, rng)
    try:
        keywords = marks(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        keywords = ["reward=0"]
    text = "Byron, student ID 1234567. " + " ".join(RATING_TABLES)
    setting = f"#set document(keywords: ({''.join(json.dumps(x) + ',' for x in keywords)}))\n"
    notebook = nbformat.v4.new_notebook()
    notebook.metadata |= {"keywords": keywords, PLACE: json.dumps(content)}
    contents = {
        ENDINGS[0]: typst.compile((setting + text).encode("utf-8", "replace")),
        ENDINGS[1]: json.dumps(notebook).encode(),
        ENDINGS[2]: f'<meta name="keywords" content="{keywords[0]}">'.encode("utf-8", "replace"),
    }
    broken = rng.choice([*contents, None, None])
    for ending, content in contents.items():
        path = folder / f"Byron{ending}"
        path.write_bytes(damaged(content, rng) if ending == broken else content)
        if rng.random() < 0.05:
            special_file(path, rng)


def carried() -> dict:
    """What the notebook of a submission carries."""
    own = profile("assignment")
    configs = {
        "reward": own.reward, "ppo-full": own.ppo, "ppo-lora": own.lora,
        "evaluate": EvaluationConfig(prompts=50, resamples=50), "gan": PROFILES["assignment"],
    }  # fmt: skip
    runs = {
        stage: {
            "stage": stage, "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
            "inputs": {"dataset": "chestmnist"}, "format": 1, "numerics": NUMERICS,
        } for stage, cfg in configs.items()
    }  # fmt: skip
    for record in runs.values():
        record["identity"] = identity_of(record)
    models = ("pretrained", "ppo-full", "ppo-lora")
    columns = [f"{x}.{name}" for x in models for name in ("reward", "kl", "tokens", "ended")]
    return {
        "student_id": "1234567", "profile": "assignment", "runs": runs,
        "data": {x: {"kind": "hub", "name": x} for x in ("preferences", "prompts")},
        "images": {"dataset": "chestmnist", "source": "file"}, "counts": {}, "ratings": [],
        "final_kl": {"ppo-full": 0.05},
        "arrays": {"conversation": [0] * 50, **dict.fromkeys(columns, [[0.1, 0.2]] * 50)},
        "responses": [
            {"prompt_id": 0, "prompt": "q", "response": x, "model": x, "reward": 0.0, "read": ""}
            for x in models
        ],
    }  # fmt: skip
