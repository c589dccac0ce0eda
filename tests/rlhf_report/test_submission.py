"""The files that are handed in: named as asked, complete, and executable again."""

import os
import shutil
from pathlib import Path

import nbformat
import pypdf
import pytest
from nbclient import NotebookClient

from experiment_runs.errors import UserError
from experiment_runs.settings import PROJECT
from rlhf_report import submission

FIXTURE = Path(__file__).parent / "quarto" / "fixture"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What is asked for comes from the test alone, and kernels find the project."""
    for name in ("LAST_NAME", *(x.removeprefix("RLHF_") for x in submission.SETTINGS)):
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
    paper, cells = submission.write("Müller", folder / "report.qmd")
    assert paper == folder / "_output" / "Müller_HW2.pdf"
    assert cells == folder / "_output" / "Müller_HW2_source_code.ipynb"
    assert "See Section 1" in pypdf.PdfReader(paper).pages[0].extract_text().replace("\xa0", " ")

    environment.delenv("RLHF_PROFILE")
    environment.setenv("RLHF_STUDENT_ID", "2")
    notebook = nbformat.read(cells, as_version=4)
    nbformat.validate(notebook)
    before = notebook.cells[-1].outputs[0].text
    assert before == "tiny 123457\n"
    NotebookClient(notebook, resources={"metadata": {"path": str(cells.parent)}}).execute()
    assert notebook.cells[-1].outputs[0].text == before
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose[0] == "# Handed in" and "See Section\xa01." in prose[1]


@pytest.mark.slow
def test_the_whole_report_is_handed_in_and_its_notebook_runs_again(environment, tmp_path):
    environment.setenv("RLHF_STUDENT_ID", "123457")
    environment.setenv("RLHF_PROFILE", "tiny")
    environment.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    shutil.copytree(PROJECT / "chapters", tmp_path / "chapters")
    for name in ("report.qmd", "_quarto.yml", "references.bib"):
        shutil.copyfile(PROJECT / name, tmp_path / name)
    _, cells = submission.write("Test", tmp_path / "report.qmd")
    notebook = nbformat.read(cells, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is not None for cell in code)
    NotebookClient(notebook, timeout=None).execute()
