"""The files that are handed in: named as asked, complete, and executable again."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
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
from rlhf_jax.ratings.questionnaire import Server
from rlhf_jax.ratings.store import CRITERIA, RATINGS, response_hash, save_rating
from rlhf_report import ratings, submission, verify
from rlhf_report.quarto.notebook import HEADING, REFERENCE, read
from rlhf_report.source_code import imported_files

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


@pytest.fixture(scope="module")
def written(tmp_path_factory, made_runs):
    """A small report that is handed in, and its runs; another one was in its folder before."""
    folder = tmp_path_factory.mktemp("handed in") / "project"
    shutil.copytree(FIXTURE, folder)
    (folder / "report.qmd").write_text(
        "---\ntitle: Handed in\n---\n\n# Prose {#sec-prose}\n\nSee @sec-prose.\n\n"
        "```{python}\nfrom os import environ\n\nfrom rlhf_report import tables\n"
        'print(environ["RLHF_PROFILE"], environ["RLHF_STUDENT_ID"])\n```\n'
    )
    other = folder / "_output" / "submission" / "Other_HW2.pdf"
    other.parent.mkdir(parents=True)
    other.touch()
    runs = made_runs(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT))
        patch.setenv("RLHF_PROFILE", "tiny")
        patch.setenv("RLHF_STUDENT_ID", "123457")
        patch.setenv("RLHF_SUBMISSION", "")  # which is set meanwhile
        return submission.write("Müller", folder / "report.qmd", runs), runs


def test_the_files_are_named_as_asked_and_alone_in_their_folder(written):
    (paper, cells, page), runs = written
    assert paper.name == "Müller_HW2.pdf" and page.name == "Müller_HW2.html"
    assert cells.name == "Müller_HW2_source_code.ipynb"
    assert set(paper.parent.iterdir()) == {paper, cells, page}  # no report of another run
    first = pypdf.PdfReader(paper).pages[0].extract_text().replace("\xa0", " ")
    assert "Müller, student ID 123457" in first and "See Section 1" in first
    assert "Müller, student ID 123457" in page.read_text()
    keywords = pypdf.PdfReader(paper).metadata["/Keywords"].split(", ")
    assert {"profile=tiny", f"evaluate={runs['evaluate'].identity}"} < set(keywords)
    for keyword in keywords:
        assert f'<meta name="keywords" content="{keyword}">' in page.read_text()
    notebook = nbformat.read(cells, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keywords == keywords
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose[0] == "# Handed in\n\nMüller, student ID 123457"
    assert prose[-1] == "# 1 Prose\n\nSee Section\xa01."


def test_the_notebook_runs_from_its_own_files_with_the_settings_of_its_runs(
    environment, tmp_path, written
):
    environment.setenv("RLHF_PROFILE", "cpu")
    environment.setenv("RLHF_RUN", "reference")
    environment.setenv("PYTHONPATH", "")
    notebook = nbformat.read(written[0][1], as_version=4)
    assert notebook.cells[-1].outputs[0].text == "tiny 123457\n"
    code = "print(tables.__file__, environ['RLHF_RUN'] or 'none')"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-2].outputs[0].text == "tiny 123457\n"
    own = tmp_path / "source_code" / "rlhf_report" / "tables.py"
    assert notebook.cells[-1].outputs[0].text == f"{own} none\n"
    assert own.read_text() == (PROJECT / "rlhf_report" / "tables.py").read_text()


def test_a_submission_leaves_out_what_others_have_trained(environment, tmp_path):
    lines = [
        "# A",
        "a",
        "## B {#sec-b .not-handed-in}",
        "b",
        "```{python}",
        "# c",
        "```",
        "### C",
        "d",
    ]
    (tmp_path / "x.qmd").write_text("\n".join([*lines, "## D", "e"]))

    def text():
        return [line.text for line in read(tmp_path / "x.qmd").lines]

    assert len(text()) == 11
    environment.setenv("RLHF_SUBMISSION", "1")
    assert text() == ["# A", "a", "## D", "e"]
    report = "\n".join(line.text for line in read(PROJECT / "report.qmd").lines)
    assert "sec-long-gan" not in report and "sec-exercises" not in report
    assert "long_trainings" not in report
    used = {label for pair in REFERENCE.findall(report) for label in pair[1:] if label}
    assert used <= set(re.findall(r"(?:\{#|#\| label: )([\w-]+)", report))


def test_programs_that_a_module_runs_as_files_come_with_it():
    found = imported_files(["from rlhf_jax.pretrained import chat_template"])
    assert PROJECT / "rlhf_jax" / "pretrained" / "render.py" in found


def test_a_heading_has_no_class_that_means_nothing():
    headings = [HEADING.fullmatch(line.text) for line in read(PROJECT / "report.qmd").lines]
    classes = {x for match in headings if match for x in re.findall(r"\.[\w-]+", match[2] or "")}
    assert classes == {".unnumbered", ".not-handed-in"}


def asked_for(monkeypatch, **changes):
    """What would be objected to, were everything else in order."""
    values = {
        "profile": "assignment", "kind": "local", "name": "SHP", "images": "dermamnist",
    } | changes  # fmt: skip
    source = SimpleNamespace(name=values["name"], kind=values["kind"])
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
        ({"kind": "hub", "name": "own/pairs"}, "the protocol says stanfordnlp/SHP; leave PREF"),
        ({"images": "histology"}, "DATA_DIR/medmnist"),
    ],
)
def test_what_would_not_count_is_told_with_its_remedy(monkeypatch, changes, named):
    assert asked_for(monkeypatch) == []
    assert asked_for(monkeypatch, kind="hub", name="stanfordnlp/SHP") == []
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


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory):
    """A submission of runs in the tiny profile, those in RLHF_RESULTS or new ones, rated on the
    questionnaire's own page, by `make submission`'s command; the folder of its files."""
    folder = tmp_path_factory.mktemp("student")
    if made := os.environ.get("RLHF_RESULTS"):
        shutil.copytree(made, folder / "results")
    variables = {
        "RLHF_PROFILE": "tiny", "RLHF_STUDENT_ID": "123456", "RLHF_LAST_NAME": "Lovelace",
        "RLHF_RESULTS": str(folder / "results"), "RLHF_FORCE": "1", "PYTHONPATH": str(PROJECT),
        "RLHF_SUBMISSION": "",  # which is set meanwhile
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in (x for x in os.environ if x.startswith("RLHF_")):
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        shutil.copytree(PROJECT / "chapters", folder / "chapters")
        for name in ("report.qmd", "_quarto.yml", "references.bib"):
            shutil.copyfile(PROJECT / name, folder / name)
        patch.setattr(submission, "PROJECT", folder)
        run = from_environment("tiny").run("evaluate")
        assert len(submission.unrated(run)) == 1
        rate_on_the_page(run)
        assert submission.unrated(run) == []
        assert submission.main([]) == 0
    return folder / "_output" / "submission"


def rate_on_the_page(run):
    """Answers the questionnaire's pages one by one, as a browser would."""
    rated = [row for row in run.samples() if row["rated"]]
    with Server(rated, run.path / RATINGS, "Ada", "person") as server:
        serving = threading.Thread(target=server.serve_forever, args=[0.01])
        serving.start()
        sent = None
        for number in itertools.count():
            with urllib.request.urlopen(server.url, sent, timeout=60) as reply:
                shown = re.search(r'name="response" value="(\w+)"', reply.read().decode())
            if not shown:  # the page says thanks, and the server ends
                break
            fields = {"token": server.token, "response": shown[1], "note": ""}
            fields |= {name: 1 + (number + k) % 5 for k, name in enumerate(CRITERIA)}
            sent = urllib.parse.urlencode(fields).encode()  # what answers it is the next page
        serving.join()


ASKED = (  # line by line, by what of it stands in the PDF
    "Lovelace, student ID 123456",
    "A reward model learns which of two answers was preferred",
    "Five pairs exactly as they go into the reward model",
    "max(0,",  # the margin loss, worked out
    "def margin_ranking_loss",
    "Loss and accuracy of the reward model on training batches and on the validation pairs",
    "Confusion matrix on the held-out pairs",
    "Classification report of the same verdicts",
    "ROC curve",
    "def generalized_advantages",
    "def clipped_policy_loss",
    "KL to the reference per token, with the protocol’s band",
    "First steps of full fine-tuning, as logged",
    "First steps of LoRA, as logged",
    "What the policies write",
    "The policies on unseen prompts: mean reward with its 95 % interval",
    "Gain over the pretrained policy",
    "coherence", "relevance", "helpfulness", "completeness", "hallucination",
    "The original model: its responses and their ratings",
    "The model tuned by PPO, every weight: its responses and their ratings",
    "The model tuned by PPO with LoRA: its responses and their ratings",
    "Comparative analysis",
    "Generated images, 8 by 4",
    "Real training images, for comparison",
    "Losses of both networks",
    "Confusion matrix of the discriminator",
    "Layers of the generator", "Layers of the discriminator",
    "Mode collapse",
    "Conclusion",
    "The protocol’s values, the values of these runs, and why they differ",
    "What LoRA trains. Everything else is frozen.",
    "References",
)  # fmt: skip
CUT = {"evaluate: prompts is 16", "gan: widths is"}  # among what departs from the protocol


@pytest.mark.slow
def test_every_line_of_the_assignment_is_in_the_pdf(handed_in):
    text = verify.opened({e: handed_in / f"Lovelace{e}" for e in submission.ENDINGS}).text
    assert [line for line in ASKED if verify.plain(line) not in text] == []
    assert "is rated by" not in text and "by an AI system" not in text
    assert "1,000 epochs, one H100" not in text  # nothing that others have trained


@pytest.mark.slow
def test_what_departs_is_all_that_is_wrong_with_a_tiny_submission(handed_in):
    told = verify.results_table([handed_in])["problem"]
    rest = [x for x in told if "the protocol says" not in x and "stands in for the data" not in x]
    kept = [x for x in rest if "KL ended at" not in x]
    assert kept == ["not made with the profile assignment"]
    assert all(any(x.startswith(start) for x in told) for start in CUT)


@pytest.mark.exhaustive
def test_the_notebook_runs_where_there_is_no_project(handed_in, tmp_path):
    shutil.copy(handed_in / "Lovelace_HW2_source_code.ipynb", tmp_path / "x.ipynb")
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("RLHF_", "PYTHON"))}
    command = [sys.executable, "-I", "-m", "nbconvert", "--to", "notebook", "--execute", "x.ipynb"]
    done = subprocess.run(
        [*command, "--output", "y.ipynb"], cwd=tmp_path, env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "source_code" / "results" / "local").glob("evaluate-*/summary.json"))
    before, after = (
        nbformat.read(tmp_path / name, as_version=4) for name in ("x.ipynb", "y.ipynb")
    )
    for one, other in zip(before.cells, after.cells, strict=True):
        if one.cell_type == "code" and not one.source.startswith(("%%writefile", "import os")):
            assert len(one.outputs) == len([x for x in other.outputs if x.get("name") != "stderr"])
