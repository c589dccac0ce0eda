"""The kinds of files that users bring, how malformed ones are made, and what reads them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import documents
import files
import models

from experiment_runs import assignment
from experiment_runs.configuration import made
from experiment_runs.errors import UserError
from experiment_runs.inventory import description
from experiment_runs.run import Run
from gan_jax import data
from gan_jax.config import GANConfig
from rlhf_jax.data.preferences import load_preferences, posts
from rlhf_jax.data.prompts import load_prompts
from rlhf_jax.export.foreign_reward_model import load_reward_model
from rlhf_jax.pretrained import hub, loading
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.profiles import profile
from rlhf_jax.ratings.store import load_ratings, rating_table
from rlhf_report.quarto.render import render
from rlhf_report.verify import results_table


class Kind(NamedTuple):
    """What is tried of a kind of files."""

    make: Callable[[Path, random.Random], None]  # writes malformed ones into a folder
    read: Callable[[Path], object]  # hands them to their reader


def read_pairs(data_dir: Path | None, given: str = "") -> None:
    posts(load_preferences(data_dir, given)[0], max_pairs_per_post=None, seed=0)


def read_model(path: Path) -> None:
    hub.identity(path, dtype="float32")
    tokenizer = loading.load(path, name="hostile").tokenizer
    texts = ["why?", "", "ä\x00\n \U0001f600", "x" * 3000, "<|im_end|>"]
    prompt_rows(texts, tokenizer, length=tokenizer.template_length + 8)
    tokenizer.decode_exact(tokenizer.encode(texts)[0])


def read_run(folder: Path) -> None:
    found = Run(folder)
    _ = found.finished, found.metrics(), description(found)
    found.rewind(1)
    found.require_finished()


def read_ratings(folder: Path) -> None:
    rating_table(files.RESPONSES, load_ratings(folder / "ratings.jsonl", files.RESPONSES))


def read_assignment(folder: Path) -> None:
    """As every module reads it that stands on it."""
    protocol = assignment.read(folder / "assignment.toml")["protocol"]
    before = dict(assignment.PROTOCOL)
    try:
        assignment.PROTOCOL.update(protocol)
        profile("assignment")
        made(GANConfig, assignment.values("gan"), "the file")
        for part, fields in protocol.items():
            assignment.departures(part, assignment.values(part))
            for field in fields:
                assignment.wanted(part, field)
    finally:
        assignment.PROTOCOL.update(before)


def read_submission(folder: Path) -> None:
    problems = [x for x in results_table([folder])["problem"] if x != "none"]
    if problems:
        raise UserError(problems[0])


# By what a process has to load for them.
KINDS = {
    "data": {
        "preferences": Kind(files.preferences, read_pairs),
        "prompts": Kind(files.prompts, load_prompts),
        "given": Kind(files.given, lambda x: read_pairs(None, str(next(x.iterdir())))),
        "images": Kind(
            files.images,
            lambda x: data.load("dermamnist", side=28, data_dir=x, student_id=None),
        ),
    },
    "models": {
        "model": Kind(models.model, read_model),
        "gguf": Kind(models.gguf_file, lambda x: read_model(x / "model.gguf")),
        "judge": Kind(models.judge, lambda x: load_reward_model(x, random_model().tokenizer)),
    },
    "results": {
        "run": Kind(files.run, read_run),
        "arrays": Kind(files.run_arrays, lambda x: Run(x).arrays()),
        "ratings": Kind(files.ratings, read_ratings),
        "assignment": Kind(files.assignment, read_assignment),
    },
    "documents": {
        "document": Kind(
            documents.document,
            lambda x: render(x / "report.qmd", ["html", "pdf"]),
        ),
        "submission": Kind(documents.submission, read_submission),
    },
}


def numbers(process: str, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """(kind, seed) of the files that fall to a process of so many in all, kinds in turn."""
    every = [kind for kinds in KINDS.values() for kind in kinds]
    for number in range(count):
        if (kind := every[number % len(every)]) in KINDS[process]:
            yield kind, seed * 10**6 + number
