"""The files that are handed in: named as asked, complete, and executable again."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pypdf
import pytest
from nbclient import NotebookClient

from experiment_runs import settings
from experiment_runs.errors import UserError
from experiment_runs.files import write_text
from experiment_runs.run import Run
from experiment_runs.settings import PROJECT
from rlhf_jax.experiment import from_environment
from rlhf_jax.ratings.store import CRITERIA, RATINGS, response_hash, save_rating
from rlhf_report import ratings, submission

FIXTURE = Path(__file__).parent / "quarto" / "fixture"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What is asked for comes from the test alone, and kernels find the project."""
    for name in ("LAST_NAME", "FORCE", *(x.removeprefix("RLHF_") for x in settings.SHOWN)):
        monkeypatch.delenv(f"RLHF_{name}", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)
    return monkeypatch


@pytest.mark.parametrize(
    ("last_name", "named"),
    [
        ("Lovelace", "Lovelace"),
        ("  van der  Berg ", "van_der_Berg"),
        ("Mu\u0308ller-Lüdenscheidt", "Müller-Lüdenscheidt"),
        ("O'Brien", "O'Brien"),
        ("St. John", "St._John"),
        ("नेहरू", "नेहरू"),
        ("李", "李"),
    ],
)
def test_names_of_people_become_names_of_files(last_name, named):
    assert submission.file_name(last_name) == named


@pytest.mark.parametrize(
    "last_name",
    ["a/b", "../up", "/root", "a\\b", "..", ".hidden", "-rf", "a\0b", "C:x", "x" * 300, "<b>", "1"],
)
def test_a_name_that_could_be_a_path_or_an_option_is_refused(last_name):
    with pytest.raises(UserError, match="LAST_NAME="):
        submission.file_name(last_name)


@pytest.mark.parametrize(
    ("last_name", "student_id", "message"),
    [
        ("", "", "LAST_NAME and STUDENT_ID missing"),
        ("", "12", "LAST_NAME missing"),
        ("Lovelace", " ", "STUDENT_ID missing"),
        ("Lovelace", "12a", "student ID '12a': not a number"),
        ("a/b", "12", "LAST_NAME='a/b'"),
    ],
)
def test_what_is_missing_or_wrong_is_named_before_anything_is_trained(
    last_name, student_id, message, environment, tmp_path, capsys
):
    environment.setenv("RLHF_LAST_NAME", last_name)
    environment.setenv("RLHF_STUDENT_ID", student_id)
    environment.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    for arguments in ([], ["--check"]):
        assert submission.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_the_files_are_named_as_asked_and_the_notebook_runs_again_with_the_same_settings(
    environment, tmp_path
):
    folder = tmp_path / "project"
    shutil.copytree(FIXTURE, folder)
    (folder / "report.qmd").write_text(
        "---\ntitle: Handed in\n---\n\n# Prose {#sec-prose}\n\nSee @sec-prose.\n\n"
        "```{python}\nfrom os import environ\n"
        'print(environ["RLHF_PROFILE"], environ["RLHF_STUDENT_ID"])\n```\n'
    )
    environment.setenv("RLHF_PROFILE", "tiny")
    environment.setenv("RLHF_STUDENT_ID", "123457")
    other = folder / "_output" / "submission" / "Other_HW2.pdf"
    other.parent.mkdir(parents=True)
    other.touch()
    runs = {"evaluate": SimpleNamespace(identity="0123abcd")}
    paper, cells, page = submission.write("Müller", folder / "report.qmd", runs)
    assert paper.name == "Müller_HW2.pdf" and page.name == "Müller_HW2.html"
    assert cells.name == "Müller_HW2_source_code.ipynb"
    assert set(other.parent.iterdir()) == {paper, cells, page}  # no report of another run
    first = pypdf.PdfReader(paper).pages[0].extract_text().replace("\xa0", " ")
    assert "Müller, student ID 123457" in first and "See Section 1" in first
    assert "Müller, student ID 123457" in page.read_text()
    assert pypdf.PdfReader(paper).metadata["/Keywords"] == "evaluate=0123abcd, profile=tiny"
    for keyword in ("evaluate=0123abcd", "profile=tiny"):
        assert f'<meta name="keywords" content="{keyword}">' in page.read_text()

    environment.delenv("RLHF_PROFILE")
    environment.setenv("RLHF_STUDENT_ID", "2")
    notebook = nbformat.read(cells, as_version=4)
    nbformat.validate(notebook)
    before = notebook.cells[-1].outputs[0].text
    assert before == "tiny 123457\n"
    NotebookClient(notebook, resources={"metadata": {"path": str(cells.parent)}}).execute()
    assert notebook.cells[-1].outputs[0].text == before
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.metadata.keywords == ["evaluate=0123abcd", "profile=tiny"]
    assert (
        prose[0] == "# Handed in\n\nMüller, student ID 123457" and "See Section\xa01." in prose[1]
    )


def asked_for(monkeypatch, **changes):
    """What would be objected to, were everything else in order."""
    values = {"profile": "assignment", "kind": "local", "images": "dermamnist"} | changes
    source = SimpleNamespace(name="SHP", kind=values["kind"])
    images = SimpleNamespace(name=values["images"], source="its source")
    monkeypatch.setattr(submission, "gan_images", lambda: images)
    return submission.objections(
        SimpleNamespace(
            profile=SimpleNamespace(name=values["profile"]), sources={"preferences": source}
        )
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"profile": "cpu"}, "PROFILE=assignment"),
        ({"kind": "stand-in"}, "DATA_DIR/shp, name them with PREFERENCES=folder"),
        ({"images": "histology"}, "DATA_DIR/medmnist"),
    ],
)
def test_what_would_not_count_is_told_with_its_remedy(monkeypatch, changes, named):
    assert asked_for(monkeypatch) == []
    (objection,) = asked_for(monkeypatch, **changes)
    assert named in objection


def test_somebody_elses_run_is_not_handed_in(environment):
    environment.setenv("RLHF_RUN", "reference")
    (objection,) = asked_for(environment)
    assert "leave RUN out" in objection


def test_an_objection_refuses_unless_it_is_forced(environment, capsys):
    submission.refuse([])
    with pytest.raises(UserError, match="(?s)one.*two.*FORCE=1"):
        submission.refuse(["one", "two"])
    environment.setenv("RLHF_FORCE", "1")
    submission.refuse(["one", "two"])
    assert capsys.readouterr().err == "warning: one\nwarning: two\n"


def test_responses_count_as_rated_when_a_person_has_rated_them(tmp_path):
    run = rated_run(tmp_path)
    rows = run.samples()
    (objection,) = submission.unrated(run)
    assert "2 of 2 responses" in objection and "rlhf_jax rate" in objection
    scores = dict.fromkeys(CRITERIA, 3)
    for rater, kind, row in (("A", "ai", rows[0]), ("A", "ai", rows[1]), ("P", "person", rows[0])):
        save_rating(run.path / RATINGS, key_of(row), rater, kind, scores)
    (objection,) = submission.unrated(run)
    assert "1 of 2 responses" in objection
    save_rating(
        run.path / RATINGS,
        response_hash(rows[1]["prompt"], rows[1]["response"]),
        "P",
        "person",
        scores,
    )
    assert submission.unrated(run) == []


def key_of(row):
    return response_hash(row["prompt"], row["response"])


def rated_run(folder):
    """An evaluation with two responses that are there to be rated."""
    record = {"stage": "evaluate", "identity": "0", "config": {}, "inputs": {}, "about": {}}
    write_text(folder / "config.json", json.dumps(record))
    run = Run(folder)
    for model in ("pretrained", "ppo-full"):
        run.sample(step=0, prompt_id=0, model=model, prompt="p", response=model, rated=True)
    return run


def test_a_submission_shows_no_ratings_by_an_ai_system_and_no_committed_run(environment, tmp_path):
    run = rated_run(tmp_path)
    key = response_hash("p", "pretrained")
    save_rating(run.path / RATINGS, key, "A", "ai", dict.fromkeys(CRITERIA, 3))
    assert len(ratings.given_ratings(run)) == 1
    assert ratings.reference_evaluation(run) is not None
    environment.setenv("RLHF_SUBMISSION", "1")
    assert ratings.given_ratings(run) == []
    assert ratings.reference_evaluation(run) is None


@pytest.mark.slow
def test_the_whole_report_is_handed_in_and_its_notebook_runs_again(environment, tmp_path):
    environment.setenv("RLHF_STUDENT_ID", "123457")
    environment.setenv("RLHF_PROFILE", "tiny")
    environment.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    shutil.copytree(PROJECT / "chapters", tmp_path / "chapters")
    for name in ("report.qmd", "_quarto.yml", "references.bib"):
        shutil.copyfile(PROJECT / name, tmp_path / name)
    runs = submission.shown_runs(from_environment())
    _, cells, _ = submission.write("Test", tmp_path / "report.qmd", runs)
    notebook = nbformat.read(cells, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is not None for cell in code)
    NotebookClient(notebook, timeout=None).execute()
