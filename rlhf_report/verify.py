"""Checks submissions: `python -m rlhf_report verify FILE_OR_FOLDER...`, as assignment.toml asks.

* names: of the files, of the student on the first page, the student ID and the images it chooses
* one run: PDF, notebook and page carry the same identities, each run's configuration is the one
  that its identity stands for, and the runs were made from each other
* ratings: the three tables are there, every rating belongs to a response, is a person's and was not
  edited afterwards, every response that is shown is rated, and the means in the PDF are theirs
* the protocol: data, every configuration, the KL at the end
* numbers: the gains' intervals in the PDF are those of the arrays that the notebook carries

It reads text and metadata and runs nothing of what is given.
"""

import collections
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pypdf

from experiment_runs.assignment import ASSIGNMENT, KL_BAND, PROTOCOL, SUBMISSION, departures
from experiment_runs.command import concluded
from experiment_runs.errors import UserError
from experiment_runs.files import LARGEST_LOG, read_whole
from experiment_runs.run import identity_of
from gan_jax.data import dataset_for
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.evaluation.response_statistics import gain
from rlhf_jax.ratings.plain_text import printable
from rlhf_jax.ratings.store import rating_from, response_hash
from rlhf_report.carried import PLACE, marks, of_ratings
from rlhf_report.ratings import criteria_table
from rlhf_report.style import with_interval
from rlhf_report.submission import ENDINGS, PROFILE

RATING_TABLES = ("The original model:", "The model tuned by PPO, every weight:", "PPO with LoRA:")
POLICIES = ("ppo-full", "ppo-lora")
PARTS = {  # of the protocol, and the stages that keep to each
    "reward": ("reward",), "ppo": POLICIES, "evaluation": ("evaluate",), "gan": ("gan",),
}  # fmt: skip
ALIKE = str.maketrans("\u2212\u2010\u2018\u2019\u201c\u201d", "--''\"\"")
UPSTREAM = ("reward", "second_reward", *POLICIES)  # named among the inputs of what was made of them


@dataclasses.dataclass(frozen=True)
class Submission:
    """The files of one student, read."""

    name: str  # as in the files' names
    pages: list[str]  # of the PDF, white space in one piece
    keywords: list[str]  # of the PDF
    notebook: nbformat.NotebookNode
    page: str  # HTML; "" where there is none

    @property
    def text(self) -> str:
        return " ".join(self.pages)


def submissions(paths: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The files of each submission, by the student's name and by ending.

    Raises:
      UserError: a path does not exist, or holds nothing that is named as a submission is.
    """
    found: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: does not exist; name the file or folder of a submission")
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        own = [(x, e) for x in files for e in ENDINGS if x.is_file() and x.name.endswith(e)]
        if not own:
            raise UserError(f"{path}: no file ends in {', '.join(ENDINGS)}")
        for file, _ in own:  # of a single file, those beside it too
            name = next(str(file)[: -len(e)] for e in ENDINGS if file.name.endswith(e))
            beside = {e: Path(name + e) for e in ENDINGS if Path(name + e).is_file()}
            found[name] |= beside
    return dict(found)


def problems(files: Mapping[str, Path]) -> list[str]:
    """What is wrong with one submission; nothing where all is as it should be."""
    missing = [f"no {ending} beside the others" for ending in ENDINGS[:2] if ending not in files]
    if missing:
        return missing
    try:
        own = opened(files)
    except (UserError, OSError) as error:
        return [str(error)]
    found = [*name_problems(own), *table_problems(own)]
    try:
        data = json.loads(own.notebook.metadata.get(PLACE, ""))
    except (AttributeError, RecursionError, TypeError, ValueError):
        return [*found, "the notebook carries no runs: it was not written by `make submission`"]
    checks = (run_problems, rating_problems, protocol_problems, number_problems)
    for check in checks:
        try:
            found += check(own, data)
        except Exception as error:  # whatever a value of another kind makes it stumble over
            what = check.__name__.removesuffix("_problems")
            found.append(f"what the notebook carries is broken ({what}): {error!r}")
    return found


def opened(files: Mapping[str, Path]) -> Submission:
    """The files of a submission, read.

    Raises:
      UserError: one of them cannot be.
    """
    paper, cells = (files[ending] for ending in ENDINGS[:2])
    try:
        reader = pypdf.PdfReader(io.BytesIO(read_whole(paper, LARGEST_LOG)))
        pages = [plain(page.extract_text()) for page in reader.pages]
        keywords = [x.strip() for x in (reader.metadata.get("/Keywords") or "").split(",")]
    except Exception as error:  # pypdf raises what a malformed file makes it stumble over
        raise UserError(f"{paper.name} cannot be read: {error}") from None
    try:
        notebook = nbformat.reads(read_whole(cells, LARGEST_LOG).decode(), as_version=4)
    except Exception as error:  # and so does nbformat
        raise UserError(f"{cells.name} cannot be read: {error}") from None
    page = ""
    if ENDINGS[2] in files:
        page = read_whole(files[ENDINGS[2]], LARGEST_LOG).decode("utf-8", "replace")
    name = paper.name.removesuffix(ENDINGS[0])
    return Submission(name, pages, keywords, notebook, page)


def plain(text: str) -> str:
    """Text as it is compared: one space where there are several, and the plain minus and quotation
    marks, which typesetting makes others of."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).translate(ALIKE))


def name_problems(own: Submission) -> Iterator[str]:
    """Whether first page and files name the same student, with an ID as the assignment has it."""
    name = plain(own.name.replace("_", " "))
    first = own.pages[0] if own.pages else ""
    given = re.search(rf"{re.escape(name)}, student ID (\S+)", first)
    if not given:
        yield f"the first page does not name {name} with a student ID"
    elif not re.fullmatch(SUBMISSION["student_id"], given[1]):
        yield f"student ID {given[1]} is not as the assignment has them: {SUBMISSION['student_id']}"


def table_problems(own: Submission) -> Iterator[str]:
    """Whether the assignment's three tables of ratings are in the PDF."""
    yield from (f"no table '{title}'" for title in RATING_TABLES if title not in own.text)


def run_problems(own: Submission, data: Mapping[str, Any]) -> Iterator[str]:
    """Whether all files show the same runs, which are what they say and belong together."""
    expected = [x for x in marks(data) if not x.startswith("ratings=")]
    in_notebook = list(own.notebook.metadata.get("keywords", []))
    if [x for x in own.keywords if not x.startswith("ratings=")] != expected:
        yield "PDF and notebook show different runs"
    elif own.keywords != in_notebook:
        yield "the notebook's keywords are not those of the PDF"
    in_page = re.findall(r'<meta name="keywords" content="([^"]*)">', own.page)
    if own.page and in_page != own.keywords:
        yield "PDF and page show different runs"
    for stage, run in data["runs"].items():
        if identity_of(run) != run["identity"]:
            yield f"{stage}: its configuration is not the one that its identity stands for"
        for name in UPSTREAM:
            made_from = run["inputs"].get(name)
            if made_from and name in data["runs"] and made_from != data["runs"][name]["identity"]:
                yield f"{stage}: was made from another run of {name}"
    images = data["runs"]["gan"]["inputs"].get("dataset")
    if images != dataset_for(data["student_id"]):
        yield f"the student ID chooses {dataset_for(data['student_id'])}, not {images}"
    if f"student ID {data['student_id']}" not in own.pages[0]:
        yield f"the notebook is of student ID {data['student_id']}, the PDF of another"


def rating_problems(own: Submission, data: Mapping[str, Any]) -> Iterator[str]:
    """Whether people rated every response that is shown, and the PDF shows what they gave."""
    if f"ratings={of_ratings(data['ratings'])}" not in own.keywords:
        yield "the ratings were edited after the PDF was made"
    responses, ratings = data["responses"], [rating_from(dict(x)) for x in data["ratings"]]
    prompts = len({row["prompt_id"] for row in responses})
    if prompts != ASSIGNMENT["ratings"]["prompts"]:
        yield (
            f"responses to {prompts} prompts are there to be rated, the assignment says "
            f"{ASSIGNMENT['ratings']['prompts']}"
        )
    hashes = {response_hash(row["prompt"], row["response"]) for row in responses}
    if strange := {rating.response_hash for rating in ratings} - hashes:
        yield f"{len(strange)} ratings are of responses that the notebook does not carry"
    if unrated := hashes - {rating.response_hash for rating in ratings}:
        yield f"{len(unrated)} of {len(hashes)} responses are not rated by a person"
    if any(rating.rater_kind != "person" for rating in ratings):
        yield "there are ratings by an AI system"
    for row in criteria_table(responses, ratings).to_dict("records"):
        means = [x for x in row.values() if isinstance(x, float) and not np.isnan(x)]
        shown = " ".join(f"{x:.2f}" for x in means)
        if means and shown not in own.text:
            yield f"the PDF does not show the mean ratings {shown} ({row['criterion']})"


def protocol_problems(own: Submission, data: Mapping[str, Any]) -> Iterator[str]:
    """What departs from the assignment's protocol."""
    if data["profile"] != PROFILE:
        yield f"not made with the profile {PROFILE}"
    yield from data_problems(data)
    for part, stages in PARTS.items():
        for stage in stages:
            done = data["runs"][stage]["config"] | data["counts"].get(stage, {})
            found = departures(part, done)
            yield from (f"{stage}: {departure}" for departure in found)
    adapters = data["runs"]["ppo-lora"]["config"]["lora"]
    yield from (f"ppo-lora: {departure}" for departure in departures("lora", adapters))
    for stage, kl in data["final_kl"].items():
        if stage in POLICIES and not KL_BAND[0] <= kl <= KL_BAND[1]:
            yield f"{stage}: KL ended at {kl:.3f} nats a token, outside {list(KL_BAND)}"


def data_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """What was read is not what the protocol names, or cannot be known to be."""
    for name, asked in PROTOCOL["data"].items():
        source = data["data"][name]
        if source["kind"] == "stand-in":
            yield f"{name}: {source['name']} stands in for the data"
        elif source["kind"] == "local":
            yield (
                f"{name}: read from {source['name']}, the protocol says {asked}: compare the "
                f"content's fingerprint, {source['fingerprint']}"
            )
        elif source["name"] != asked:
            yield f"{name}: {source['name']}, the protocol says {asked}"
    if data["images"]["dataset"] != data["runs"]["gan"]["inputs"].get("dataset"):
        yield f"images: {data['images']['source']} stands in for the data"


def number_problems(own: Submission, data: Mapping[str, Any]) -> Iterator[str]:
    """Whether the gains in the PDF are those of the rewards that the notebook carries."""
    cfg = EvaluationConfig(**data["runs"]["evaluate"]["config"])
    columns: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for name, values in data["arrays"].items():
        policy, _, column = name.rpartition(".")
        columns[policy][column] = np.array(values, dtype=float)  # null is nan
    conversations, base = columns[""]["conversation"], columns["pretrained"]
    for policy in POLICIES:
        shown = with_interval(gain(columns[policy], base, conversations, cfg)["reward"], 2)
        if plain(shown) not in own.text:
            yield f"{policy}: the arrays give a gain of {shown}, which the PDF does not show"


def results_table(paths: Sequence[Path]) -> pd.DataFrame:
    """One row for everything that is wrong with a submission, or one that says that nothing is."""
    rows = [
        {"submission": name, "problem": problem}
        for name, files in submissions(paths).items()
        for problem in problems(files) or ["none"]
    ]
    return pd.DataFrame(rows)


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        if not arguments:
            raise UserError("name a file or folder: python -m rlhf_report verify FILE_OR_FOLDER...")
        rows = results_table([Path(x) for x in arguments])
        width = max(map(len, rows["submission"]))
        for name, problem in [tuple(rows.columns), *rows.itertuples(index=False)]:
            print(f"{name:<{width}}  {printable(problem):.1000}")  # a value may be of any length
        wrong = rows.loc[rows["problem"] != "none", "submission"].nunique()
        print(f"{rows['submission'].nunique()} submissions, {wrong} with problems")

    return concluded(work)
