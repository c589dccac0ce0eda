"""The chapters can be read by people who do not see colours, or do not see at all."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from experiment_runs.files import write_text
from experiment_runs.run import Run
from experiment_runs.settings import PROJECT
from rlhf_report import evaluation, ppo, style
from rlhf_report.quarto import notebook

RECORD = {"stage": "stage", "identity": "0", "config": {}, "inputs": {}, "about": {}}

REPORT = PROJECT / "report.qmd"
CHAPTERS = sorted((PROJECT / "chapters").glob("*.qmd"))
LONGEST_CELL = 10  # lines


def cells(path):
    return [x for x in notebook.build(notebook.read(path), {}).cells if x.cell_type == "code"]


def test_the_report_includes_every_chapter():
    included = {line.path for line in notebook.read(REPORT).lines}
    assert included == {REPORT, *CHAPTERS}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_figure_has_an_alternative_text_of_its_own(path):
    for cell in cells(path):
        options = cell.metadata.options
        if options.get("label", "").startswith("fig-"):
            alternatives = options.get("fig-alt", "")
            for text in [alternatives] if isinstance(alternatives, str) else alternatives:
                assert len(text) > 20 and text != options["fig-cap"], cell.metadata.place
    for alternative in re.findall(r"!\[(.*?)\]\(.*?\)", path.read_text()):
        assert alternative


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_cells_are_short(path):
    for cell in cells(path):
        code = [line for line in cell.source.split("\n") if line and not line.startswith("#|")]
        assert len(code) <= LONGEST_CELL, cell.metadata.place


@pytest.mark.parametrize("path", CHAPTERS[1:7], ids=lambda path: path.stem)
def test_a_chapter_with_claims_ends_with_its_limits(path):
    headings = re.findall(r"^## (.*?)(?: \{.*)?$", path.read_text(), re.MULTILINE)
    assert headings[-1] == "Limits"


@pytest.mark.parametrize("path", CHAPTERS[:-1], ids=lambda path: path.stem)
def test_a_chapter_alone_refers_to_nothing_in_another(path):
    """Rendered alone it would print "?@sec-other"."""
    text = path.read_text()
    used = {label for pair in re.findall(notebook.REFERENCE, text) for label in pair[1:] if label}
    defined = set(re.findall(r"(?:\{#|#\| label: )([\w-]+)", text))
    assert used <= defined


def test_git_ignores_what_quarto_would_have_it_ignore():
    """Quarto adds these lines by itself, after which every run counts as made of changed code."""
    lines = (PROJECT / ".gitignore").read_text().splitlines()
    assert {"/.quarto/", "**/*.quarto_ipynb"} <= set(lines)


@pytest.mark.parametrize("kind", ["fig", "tbl"])
def test_the_lists_name_everything_that_has_a_caption_once(kind):
    labels = [x.metadata.options.get("label", "") for x in cells(REPORT)]
    labels = [label for label in labels if label.startswith(kind)]
    listed = re.findall(r"^\* @([\w-]+): \S", notebook.captions(kind, REPORT), re.MULTILINE)
    assert len(listed) > 10 and listed == labels


@pytest.fixture
def training(tmp_path):
    """Training runs of both variants, with a few logged steps."""
    runs = {}
    for number, name in enumerate(("ppo-full", "ppo-lora")):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "config.json", json.dumps(RECORD))
        runs[name] = Run(tmp_path / name)
        for step in range(1, 30):
            kl = 0.01 * (step + number)
            runs[name].log(step=step, kl=kl, kl_weight=0.1 + number, reward=step)
    return runs


def evaluated(folder):
    own = {"value": 0.1, "low": 0.0, "high": 0.2}
    policies = {name: {"reward": own} for name in style.VARIANT_STYLES}
    summary = {
        "identity": "0",
        "policies": policies,
        "gains": {name: policies[name] for name in list(policies)[1:]},
    }
    write_text(folder / "config.json", json.dumps(RECORD))
    write_text(folder / "summary.json", json.dumps(summary))
    return Run(folder)


def test_lines_and_points_differ_in_shape_as_well_as_in_colour(training, tmp_path):
    run = evaluated(tmp_path)
    for draw in (
        lambda: evaluation.overview_figure(run, training),
        lambda: ppo.kl_figure(training),
        lambda: ppo.step_figure(training, {"kl": "KL", "kl_weight": "coefficient"}),
        lambda: evaluation.rewards_figure(run),
    ):
        draw()
        for ax in plt.gcf().axes:
            data = [x for x in ax.get_lines() if x.get_marker() not in ("None", "_", "|", 2, 3)]
            shapes = {(line.get_marker(), line.get_linestyle()) for line in data}
            assert len(shapes) == len(data) > 1
        plt.close("all")
