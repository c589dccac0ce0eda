"""A submission that is not what it should be is named with what is wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from experiment_runs.files import encode
from experiment_runs.run import identity_of
from experiment_runs.settings import PROJECT
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.evaluation.response_statistics import gain
from rlhf_report import carried, ratings, submission, verify
from rlhf_report.style import with_interval

FIXTURE = Path(__file__).parent / "quarto" / "fixture"
STUDENT_ID = "123457"
MODELS = ("pretrained", "ppo-full", "ppo-lora")


def report(run):
    """A report in which everything stands that a checker looks for."""
    arrays, cfg = run.arrays(), EvaluationConfig(**run.config)
    columns = {
        model: {
            name.split(".")[-1]: x for name, x in arrays.items() if name.startswith(model + ".")
        }
        for model in MODELS
    }
    base, together = columns["pretrained"], arrays["conversation"]
    gains = [gain(columns[model], base, together, cfg)["reward"] for model in MODELS[1:]]
    rated, given = ratings.rated_responses(run), ratings.people_ratings(run)
    means = ratings.criteria_table(rated, given).select_dtypes("float")
    lines = [f"{title} its responses." for title in verify.RATING_TABLES]
    lines += [f"A gain of {with_interval(own, 2)}." for own in gains]
    lines += [" ".join(f"{x:.2f}" for x in row) for row in means.to_numpy()]
    return "\n\n".join(lines)


@pytest.fixture(scope="module")
def hand_in(tmp_path_factory, made_runs):
    """A function that hands in a small report of some runs, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)
        patch.setenv("RLHF_STUDENT_ID", STUDENT_ID)
        patch.setenv("RLHF_PROFILE", "assignment")

        def write(change=lambda text: text, name="Lovelace", **options):
            folder = tmp_path_factory.mktemp("project")
            runs = made_runs(folder / "results", **options)
            shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
            text = change(report(runs["evaluate"]))
            (folder / "report.qmd").write_text(f"---\ntitle: Handed in\n---\n\n{text}")
            paper, *_ = submission.write(submission.file_name(name), folder / "report.qmd", runs)
            return paper.parent

        yield write


@pytest.fixture(scope="module")
def good(hand_in):
    return hand_in()


@pytest.fixture
def copy(good, tmp_path):
    """The good submission's files, to break."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


def found(folder):
    return list(verify.results_table([folder])["problem"])


def edit(folder, change):
    """Changes what the notebook of a submission carries."""
    path = folder / "Lovelace_HW2_source_code.ipynb"
    notebook = nbformat.read(path, as_version=4)
    data = json.loads(notebook.metadata[carried.PLACE])
    change(data)
    notebook.metadata[carried.PLACE] = encode(data)
    nbformat.write(notebook, path)


def test_a_submission_in_order_has_no_problem(good):
    assert found(good) == ["none"]
    assert found(good / "Lovelace_HW2.pdf") == ["none"]  # with the notebook beside it


def test_the_pdf_of_another_run_is_named(copy, hand_in):
    shutil.copyfile(hand_in(seed=1) / "Lovelace_HW2.pdf", copy / "Lovelace_HW2.pdf")
    told = found(copy)
    assert "PDF and notebook show different runs" in told
    assert any("gain of" in x and "does not show" in x for x in told)


def test_edited_ratings_are_named(copy):
    edit(copy, lambda data: data["ratings"][0].update(coherence=5, helpfulness=5))
    told = found(copy)
    assert told[0] == "the ratings were edited after the PDF was made"
    assert any("does not show the mean ratings" in x for x in told[1:])


def test_a_wrong_name_is_named(copy):
    for file in list(copy.iterdir()):
        file.rename(file.with_name(file.name.replace("Lovelace", "Babbage")))
    assert found(copy) == ["the first page does not name Babbage with a student ID"]


@pytest.mark.parametrize("name", ["O'Brien", "St. John-O\u2019Neill"])
def test_a_name_is_found_however_it_was_typeset(hand_in, name):
    assert found(hand_in(name=name)) == ["none"]


def test_a_missing_table_is_named(hand_in):
    broken = hand_in(lambda text: text.replace("PPO with LoRA:", "LoRA"))
    assert found(broken) == ["no table 'PPO with LoRA:'"]


def test_a_departure_from_the_protocol_is_named(hand_in):
    """Of pairs and images it counts what the run had, not what it asked for."""
    less = {"reward": {"pairs": {"train": 4541}}, "gan": {"dataset": "histology", "source": "x"}}
    broken = hand_in(ppo_full={"inner_epochs": 3}, found=less)
    assert sorted(found(broken)) == [
        "images: x stands in for the data",
        "ppo-full: inner_epochs is 3, the protocol says 4",
        "reward: train_pairs is 4541, the protocol says at least 5,000",
    ]


def source(which, **changes):
    return lambda data: data["data"][which].update(changes)


def no_identity(data):
    data["runs"]["ppo-lora"]["config"]["learning_rate"] = 1.0


def other_upstream(data):
    own = data["runs"]["evaluate"]
    own["inputs"]["reward"] = "0" * 16
    own["identity"] = identity_of(own)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_identity, "ppo-lora: its configuration is not the one that its identity stands for"),
        (other_upstream, "evaluate: was made from another run of reward"),
        (lambda data: data.update(student_id="123456"), "student ID chooses dermamnist, not chest"),
        (lambda data: data.update(profile="cpu"), "not made with the profile assignment"),
        (source("prompts", kind="stand-in", name="x"), "prompts: x stands in for the data"),
        (source("prompts", name="a/b"), "prompts: a/b, the protocol says OpenAssistant/oasst1"),
        (
            source("preferences", kind="local", name="a.jsonl"),
            "preferences: read from a.jsonl, the protocol says stanfordnlp/SHP: compare the "
            "content's fingerprint, 0123",
        ),
        (
            lambda data: data["counts"]["ppo-lora"].update(prompts=9),
            "ppo-lora: prompts is 9, the protocol says at least 2,000",
        ),
        (lambda data: data["final_kl"].update({"ppo-full": 0.2}), "KL ended at 0.200 nats a token"),
        (lambda data: data["ratings"].clear(), "9 of 9 responses are not rated by a person"),
        (lambda data: data["ratings"][0].update(rater_kind="ai"), "ratings by an AI system"),
        (lambda data: data["responses"].pop(), "1 ratings are of responses that the notebook does"),
        (lambda data: data["arrays"]["ppo-full.reward"].reverse(), "ppo-full: the arrays give a "),
        (lambda data: data.pop("arrays"), "what the notebook carries is broken (number)"),
        (lambda data: data.update(ratings=[{}]), "what the notebook carries is broken (rating)"),
    ],
)
def test_what_the_notebook_carries_is_checked(copy, change, told):
    edit(copy, change)
    assert any(told in problem for problem in found(copy)), found(copy)
    assert "none" not in found(copy)


def test_a_page_of_another_run_and_a_notebook_without_runs_are_named(copy):
    page = copy / "Lovelace_HW2.html"
    page.write_text(page.read_text().replace("evaluate=", "evaluate=0"))
    assert found(copy) == ["PDF and page show different runs"]
    nbformat.write(nbformat.v4.new_notebook(), copy / "Lovelace_HW2_source_code.ipynb")
    assert "the notebook carries no runs: it was not written by `make submission`" in found(copy)
    (copy / "Lovelace_HW2_source_code.ipynb").unlink()
    assert found(copy) == ["no _HW2_source_code.ipynb beside the others"]


def test_thirty_submissions_are_one_table(good, tmp_path, capsys):
    folder = tmp_path / "all"
    for number in range(30):
        shutil.copytree(good, folder / str(number))
    for file in (folder / "7").iterdir():
        file.rename(file.with_name(file.name.replace("Lovelace", "Babbage")))
    assert verify.main([str(folder)]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["submission", "problem"] and len(rows) == 30
    assert last == "30 submissions, 1 with problems"
    (wrong,) = [row for row in rows if not row.endswith("  none")]
    assert re.search(r"7/Babbage +the first page does not name Babbage", wrong)


@pytest.mark.parametrize(
    "content", ["[]", "null", "5", '{"cells": 5}', "[" * 10**5, '{"metadata": []}'], ids=len
)
def test_a_notebook_of_another_kind_is_one_line_of_the_table(good, tmp_path, content):
    """And what it says of itself is printed as text, of bounded length."""
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    (copy / "Lovelace_HW2_source_code.ipynb").write_text(content)
    assert any("cannot be read" in x or "carries no runs" in x for x in found(copy))


def test_values_of_a_notebook_are_printed_as_text_of_bounded_length(copy, capsys):
    edit(copy, lambda own: own.update(student_id="\x1b[2J" + "x" * 10**6))
    verify.main([str(copy)])
    said = capsys.readouterr().out
    assert "\x1b" not in said and max(map(len, said.splitlines())) < 2000


def test_a_file_that_is_no_submission_is_told(tmp_path, capsys):
    for wrong in ([], [str(tmp_path)], [str(tmp_path / "lost")]):
        assert verify.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for ending in verify.ENDINGS:
        (tmp_path / f"A{ending}").write_text("no such thing")
    (told,) = found(tmp_path)
    assert "A_HW2.pdf cannot be read" in told


@pytest.mark.parametrize("ending", verify.ENDINGS)
def test_a_file_without_end_is_one_line_of_the_table(copy, ending):
    os.truncate(copy / f"Lovelace{ending}", 2**36)
    (told,) = found(copy)
    assert ending in told and "68,719,476,736 bytes" in told
