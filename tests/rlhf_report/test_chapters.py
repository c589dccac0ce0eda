"""The chapters can be read by people who do not see colours, or do not see at all."""

import ast
import builtins
import fnmatch
import inspect
import json
import re

import matplotlib.pyplot as plt
import pytest

from experiment_runs import settings
from experiment_runs.assignment import PROTOCOL
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


@pytest.mark.parametrize("handed_in", [False, True], ids=["whole", "handed in"])
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_a_chapter_calls_exists_and_takes_what_it_is_given(monkeypatch, path, handed_in):
    """A call in a section that no test renders would be found wrong by readers only, and so would
    a name that a section takes from one which is left out of what is handed in."""
    monkeypatch.setattr(settings, "submission", lambda: handed_in)
    text = "\n".join(line.text for line in notebook.read(path).lines)
    code = [*(cell.source for cell in cells(path)), *notebook.INLINE.findall(text)]
    nodes = [node for part in code for node in ast.walk(ast.parse(part.strip()))]
    known = dict(vars(builtins))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), known)
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert {node.id for node in names} - made <= set(known)
    for node in nodes:
        if not isinstance(node, ast.Call) or not (called := resolved(node.func, known, made)):
            continue
        if not any(isinstance(x, ast.Starred) for x in node.args):
            named = {x.arg: None for x in node.keywords if x.arg}
            try:
                inspect.signature(called).bind(*node.args, **named)
            except TypeError as error:
                pytest.fail(f"{path.name}: {ast.unparse(node)}: {error}")


def resolved(node, known, made):
    """What is called, where it is a function of an imported module or an imported one itself."""
    if isinstance(node, ast.Name) and node.id not in made and node.id not in vars(builtins):
        return known[node.id]
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, known, made)
        return getattr(owner, node.attr) if inspect.ismodule(owner) else None
    return None


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


@pytest.mark.parametrize("field", ["latents", *sorted({*PROTOCOL["gan"]} - {"epochs"})])
def test_the_chapter_on_the_dcgan_prints_what_it_was_trained_with(field):
    (path,) = (path for path in CHAPTERS if path.stem == "06-dcgan")
    assert f'gan.config["{field}"]' in path.read_text()


@pytest.mark.parametrize("kind", ["fig", "tbl"])
def test_the_lists_name_everything_that_has_a_caption_once(kind):
    text = "\n".join(line.text for line in notebook.read(REPORT).lines)
    labels = re.findall(rf"(?:^#\| label: |^: .*\{{#)({kind}-[\w-]+)", text, re.MULTILINE)
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


def test_quarto_renders_the_report_and_every_chapter_alone():
    """A bare `quarto render` takes what _quarto.yml lists; a chapter that it misses has no page."""
    settings = notebook.parse_yaml((PROJECT / "_quarto.yml").read_text(), "_quarto.yml")
    report, chapters = settings["project"]["render"]
    assert report == REPORT.name
    found = {path for path in CHAPTERS if fnmatch.fnmatch(f"/chapters/{path.name}", chapters)}
    assert found == {path for path in CHAPTERS if not path.name.startswith("_")}


def test_quartos_own_pdf_gets_the_layout_that_the_built_in_renderer_has():
    """Without these its columns collide, tables run over the foot of a page, code is justified,
    and sections are numbered 1.1.a."""
    settings = notebook.parse_yaml((PROJECT / "_quarto.yml").read_text(), "_quarto.yml")
    typst = settings["format"]["typst"]
    assert typst["section-numbering"] == "1.1.1" and typst["date-format"] == "long"
    (header,) = (item["text"] for item in typst["include-in-header"])
    for rule in (
        '#show figure.where(kind: "quarto-float-tbl"): set block(breakable: true)',
        "#show table: set par(justify: false)",
        "#show raw.where(block: true): set par(justify: false)",
    ):
        assert rule in header


def contrast(one, other):
    """The contrast of two colours (WCAG 2.1): 4.5 is the least for text at level AA."""

    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


ASSETS = PROJECT / "rlhf_report" / "quarto" / "assets"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_can_be_read_on_its_background(theme):
    style = (ASSETS / "report.css").read_text()
    colours = dict(re.findall(r"--([a-z]+): (#\w{6});", style.split(":root {")[theme + 1]))
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ink in ("ink", "soft", "link", "keyword", "string", "number", "comment"):
        for paper in ("paper", "faint"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_quartos_dark_theme_can_be_read_too():
    slate = "#272b30"  # its background; its own grey for muted text and links has 3.65
    colours = re.findall(r"^\$[\w-]+: (#\w{6});", (ASSETS / "dark.scss").read_text(), re.MULTILINE)
    assert contrast("#7a8288", slate) < 4.5
    assert len(colours) >= 3 and all(contrast(colour, slate) >= 4.5 for colour in colours)
