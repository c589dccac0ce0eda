"""The kinds of files that users bring, how malformed ones are made, and what reads them."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import documents
import files
import jax
import jax.numpy as jnp
import models
import numpy as np

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
from rlhf_jax.ratings.store import CRITERIA, load_ratings, rating_table
from rlhf_report.quarto.render import render
from rlhf_report.verify import results_table


class Kind(NamedTuple):
    """What is tried of a kind of files."""

    make: Callable[[Path, random.Random], None]  # writes malformed ones into a folder
    read: Callable[[Path], object]  # hands them to their reader


# Where it accepts what means nothing a reader fails an assertion, which counts as a traceback.


def check_text(*texts: str) -> None:
    """Something that a tokenizer can read and a page can show."""
    for text in texts:
        assert isinstance(text, str) and text.strip(), f"no text: {text!r:.80}"
        text.encode()


def read_pairs(data_dir: Path | None, given: str = "") -> None:
    for post in posts(load_preferences(data_dir, given)[0], max_pairs_per_post=None, seed=0):
        check_text(post.prompt, *post.replies, *(text for _, text in post.turns))
        assert len({*post.replies}) == len(post.replies) and post.pairs
        for chosen, rejected in post.pairs:
            assert chosen != rejected and {chosen, rejected} <= {*range(len(post.replies))}
        assert all(math.isfinite(score) and score >= 0 for score in post.scores)


def read_prompts(data_dir: Path) -> None:
    found, _ = load_prompts(data_dir)
    for prompt in found:
        check_text(prompt.text, *(text for _, text in prompt.turns))
    assert len({prompt.prompt_id for prompt in found}) == len(found)


def read_images(data_dir: Path) -> None:
    found = data.load("dermamnist", side=28, data_dir=data_dir, student_id=None)
    for images, fewest in ((found.train, 1), (found.held_out, 32)):
        assert images.dtype == np.uint8 and images.shape[1:] == (28, 28, 3)
        assert len(images) >= fewest


def read_model(path: Path) -> None:
    """Its weights are numbers, and its template hands on what it is given, once."""
    hub.identity(path, dtype="float32")
    model = loading.load(path, name="hostile")
    tokenizer = model.tokenizer
    texts = ["why?", "", "ä\x00\n \U0001f600", "x" * 3000, "<|im_end|>"]
    rows, mask, _ = prompt_rows(texts, tokenizer, length=tokenizer.template_length + 8)
    question = tokenizer.decode_exact(tokenizer.encode(texts)[0])
    assert question == "why?", f"read as {question!r:.80}"
    asked = tokenizer.decode_exact(rows[0][mask[0]])
    assert asked.count(question) == 1, f"in the template: {asked!r:.200}"
    assert rows.min() >= 0 and rows.max() < model.config.vocab_size
    for leaf in jax.tree.leaves(model.state):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() < 1e6


def read_judge(path: Path) -> None:
    tokenizer = random_model().tokenizer
    judge = load_reward_model(path, tokenizer)
    for leaf in jax.tree.leaves(judge.state):
        assert jnp.isfinite(leaf).all()


def read_run(folder: Path) -> None:
    """A run that counts as finished shows what it was finished with."""
    (path,) = folder.glob("reward-*")
    found = Run(path)
    content = found.metrics(), description(found)
    if not found.finished:
        found.rewind(1)
    found.require_finished()
    assert found.summary == files.SUMMARY and content[0].to_dict("records") == files.LOGGED
    assert found.stage == "reward" and found.config == {"lora": None, "seeds": [1]}


def read_arrays(folder: Path) -> None:
    (path,) = folder.glob("reward-*")
    found = Run(path).arrays()
    assert {*found} == {"reward", "second_reward.reward"}
    for name, array in files.ARRAYS.items():
        np.testing.assert_array_equal(found[name.replace("gold", "second_reward")], array)


def read_ratings(folder: Path) -> None:
    found = load_ratings(folder / "ratings.jsonl", files.RESPONSES)
    rating_table(files.RESPONSES, found)
    for rating in found:
        check_text(rating.rater)
        assert {getattr(rating, name) for name in CRITERIA} <= {1, 2, 3, 4, 5}


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


def read_document(folder: Path) -> None:
    """Into a whole page and a PDF."""
    render(folder / "report.qmd", ["html", "pdf"])
    (page,) = folder.rglob("report.html")
    assert "</html>" in page.read_text()[-100:]
    (printed,) = folder.rglob("report.pdf")
    assert printed.read_bytes()[:5] == b"%PDF-"


def read_submission(folder: Path) -> None:
    """Without a problem is only what names the student and the runs."""
    table = results_table([folder])
    problems = [x for x in table["problem"] if x != "none"]
    if problems:
        raise UserError(problems[0])
    assert len(table) == 1


# By what a process has to load for them.
KINDS = {
    "data": {
        "preferences": Kind(files.preferences, read_pairs),
        "prompts": Kind(files.prompts, read_prompts),
        "given": Kind(files.given, lambda x: read_pairs(None, str(next(x.iterdir())))),
        "images": Kind(files.images, read_images),
    },
    "models": {
        "model": Kind(models.model, read_model),
        "gguf": Kind(models.gguf_file, lambda x: read_model(x / "model.gguf")),
        "judge": Kind(models.judge, read_judge),
    },
    "results": {
        "run": Kind(files.run, read_run),
        "arrays": Kind(files.run_arrays, read_arrays),
        "ratings": Kind(files.ratings, read_ratings),
        "assignment": Kind(files.assignment, read_assignment),
    },
    "documents": {
        "document": Kind(documents.document, read_document),
        "submission": Kind(documents.submission, read_submission),
    },
}


def numbers(process: str, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """(kind, seed) of the files that fall to a process of so many in all, kinds in turn."""
    every = [kind for kinds in KINDS.values() for kind in kinds]
    for number in range(count):
        if (kind := every[number % len(every)]) in KINDS[process]:
            yield kind, seed * 10**6 + number
