"""Both outputs of the built-in renderer say what Quarto says, and the rest is refused by name."""

import html
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pypdf
import pytest
from nbclient import NotebookClient

from experiment_runs.settings import PROJECT
from rlhf_report.quarto import notebook, render
from rlhf_report.quarto.cells import INVISIBLE
from rlhf_report.quarto.document import pandoc
from rlhf_report.quarto.notebook import captions
from rlhf_report.tables import escape, quote, source, table

FIXTURE = Path(__file__).parent / "fixture"
OTHER = os.environ.get("QUARTO_FIXTURE")  # a directory with report.qmd and Quarto's expected.json
HOSTILE = [
    "<script>alert(1)</script> <b>bold</b> &amp; <!-- gone -->",
    "# Heading\n\n* item\n1. one\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n    code\n\n---\nend",
    "$x^2$ [a](http://b) ![c](d.png) `e` ^[f] [^1] ~g~ :smile: \\newpage \\alpha -- 'h' \"i\" ...",
    "```python\nx\n```\n::: {.callout-note}\n:::\n@fig-none [@nobody] {#fig-x} {=html}",
    '#raw("x") #panic() $ x $ @foo <label> *b* _i_ = head // no /* no */ \\u{1F600} #{ 1 + 1 }',
    "{{< include secret >}} {{{< x >}}} `{python} 1 / 0` `r x` {{% y %}}",
    "\u202eright to left\u202c \u2067x\u2069 \ufeff",
    "NUL\x00 ESC\x1b[31m BEL\x07 DEL\x7f NEL\x85 \x0b \x0c \ud800 \ufffe \u2028",
    "smile 😀, heart ❤",
    "x" * 20_000,
]


@pytest.fixture(scope="module", autouse=True)
def kernels_find_the_project():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module", params=[FIXTURE, OTHER], ids=["own", "quarto"])
def written(request, tmp_path_factory):
    """The three outputs of a fixture, and the facts that Quarto's outputs state."""
    if request.param is None:
        pytest.skip("QUARTO_FIXTURE names no directory with Quarto's own fixture")
    folder = tmp_path_factory.mktemp("report") / "project"
    shutil.copytree(request.param, folder)
    formats = ["html", "typst", "ipynb"]
    page, paper, cells = render.render(folder / "report.qmd", formats)
    return page, paper, cells, json.loads((folder / "expected.json").read_text())


def squeeze(text):
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()


def page_text(page):
    """What a reader of the HTML page sees."""
    text = re.sub(r"<(annotation|style|title)\b.*?</\1>", "", page, flags=re.DOTALL)
    return squeeze(html.unescape(re.sub(r"<[^>]*>", "", text)))


def paper_text(paper):
    """What a reader of the PDF sees."""
    return squeeze("\n".join(page.extract_text() for page in pypdf.PdfReader(paper).pages))


def alternatives(paper):
    """The alternative texts of the images in a PDF."""
    found, nodes = [], [pypdf.PdfReader(paper).trailer["/Root"]["/StructTreeRoot"]]
    while nodes:
        node = nodes.pop().get_object()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            found += [str(node[key]) for key in ("/Alt",) if key in node]
            nodes += [node[key] for key in ("/K",) if key in node]
    return found


def test_both_outputs_show_the_sections_captions_references_and_text_of_quarto(written):
    page, paper, _, expected = written
    groups = ("sections", "captions", "equation_numbers", "references", "inline", "callouts")
    values = [value for group in groups for value in expected[group].values()]
    values += [*expected["citations_html"].values(), expected["literal_text"]]
    texts = {"html": page_text(page.read_text()), "pdf": paper_text(paper)}
    missing = [(kind, x) for kind, text in texts.items() for x in values if x not in text]
    assert not missing
    assert not any("?@" in text or "never shown" in text for text in texts.values())
    assert not any("a progress bar" in text.replace('"a progress', "") for text in texts.values())


def test_references_in_the_page_lead_to_what_they_name(written):
    page, _, _, expected = written
    page = page.read_text()
    links = re.findall(r'<a\s+href="#([^"]+)"\s+class="quarto-xref">(.*?)</a>', page, re.DOTALL)
    links = {(label, squeeze(text)) for label, text in links}
    for reference, text in expected["references"].items():
        label = re.search(r"@([\w-]+)", reference)[1]
        assert (label, text) in links
        assert f'id="{label}"' in page


def test_captions_stand_below_figures_and_above_tables(written):
    page, paper, _, expected = written
    for figure in re.findall(r"<figure.*?</figure>", page.read_text(), re.DOTALL):
        assert figure.index("<img") < figure.index("<figcaption")
    text = paper_text(paper)
    for label, caption in expected["captions"].items():
        if label.startswith("tbl-"):
            assert re.match(r" \w+ \w+ \w+", text.split(caption)[1])  # the head follows


def test_images_have_alternative_text_and_code_is_folded_where_it_is_shown(written):
    page, paper, _, expected = written
    spoken = alternatives(paper)
    page = page.read_text()
    for text in expected["alt_text"].values():
        assert f'alt="{text}"' in page and text in spoken
    assert page.count("<details") == len(expected["code_shown"])


def test_a_cell_says_what_is_folded_under_it(written):
    summary = re.search(r"<summary>(.*?)</summary>", written[0].read_text())[1]
    assert html.unescape(summary) == written[3].get("code_summary", "Code")


def test_the_page_needs_nothing_but_itself(written):
    page = written[0].read_text()
    targets = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(x.startswith(("#", "data:")) for x in targets)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_the_pdf_knows_its_title_and_language(written):
    reader = pypdf.PdfReader(written[1])
    assert squeeze(reader.metadata.title) in paper_text(written[1])
    assert reader.trailer["/Root"]["/Lang"] == "en"


def test_the_executed_notebook_runs_again_from_top_to_bottom(written):
    cells = nbformat.read(written[2], as_version=4)
    resources = {"metadata": {"path": str(written[2].parent.parent)}}
    NotebookClient(cells, resources=resources).execute()
    text = "\n".join(x.source for x in cells.cells if x.cell_type == "markdown")
    assert "{{< include" not in text and ":::" not in text and "@fig-" not in text
    assert "Figure\u00a01" in text


def test_the_notebook_has_captions_numbers_and_citations_in_words(written):
    expected, cells = written[3], nbformat.read(written[2], as_version=4).cells
    prose = "\n".join(x.source for x in cells if x.cell_type == "markdown")
    for label, caption in expected["captions"].items():
        kind = {"fig": "Figure", "tbl": "Table"}.get(label[:3])
        if kind and not re.search(r"-\d+$", label):  # panels have theirs in the picture
            assert re.search(rf"\*\*{kind}\u00a0\d+:\*\* ", prose), caption
    keys = re.findall(r"^@\w+\{([^,]+),", (FIXTURE / "references.bib").read_text(), re.MULTILINE)
    assert keys and not any(f"@{key}" in prose for key in keys)
    assert re.search(r"\\tag\{1\}\n\$\$", prose) and "{#" not in prose
    assert re.search(r"References\n+(\* .*\n?)+\Z", prose)


def test_a_chapters_notebook_opens_with_the_settings_of_its_runs(tmp_path, monkeypatch):
    """Without them it would begin to train what nobody asked for."""
    monkeypatch.setenv("RLHF_PROFILE", "tiny")
    monkeypatch.setenv("RLHF_RUN", "reference")
    monkeypatch.delenv("RLHF_DATA_DIR", raising=False)
    text = "# Alone\n\nBy @bradley1952paired.\n\n```{python}\n1\n```\n"
    (cells,) = render.render(project(tmp_path, text), ["ipynb"])
    first, *others = nbformat.read(cells, as_version=4).cells
    assert first.cell_type == "code" and "RLHF_PROFILE='tiny'" in first.source
    assert "RLHF_RUN='reference'" in first.source and "RLHF_DATA_DIR=''" in first.source
    assert "By Bradley and Terry (1952)." in others[0].source
    assert others[-1].source.startswith("## References\n\n* Bradley, Ralph Allan")


def project(folder, text, **files):
    """A project of the fixture's settings with one document, ready to render."""
    for name in ("_quarto.yml", "references.bib"):
        shutil.copyfile(FIXTURE / name, folder / name)
    for name, content in files.items():
        (folder / f"{name}.qmd").write_text(content)
    (folder / "report.qmd").write_text(text)
    return folder / "report.qmd"


HEAD = "---\ntitle: T\n---\n\n"


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        (HEAD + "{{< video x.mp4 >}}", 5, "shortcode"),
        (HEAD + "a\n\n{{< include lost.qmd >}}", 7, "lost.qmd"),
        (HEAD + "a\n\n{{< include report.qmd >}}", 7, "includes itself"),
        ("---\ndate: 2024-13-45\n---\n", 1, "cannot be read"),
        (HEAD + "```{python}\n#| fig-width: 3\n```", 5, "'fig-width'"),
        (HEAD + "```{python}\n#| output: maybe\n```", 5, "'maybe'"),
        (HEAD + "```{python}\n#| label: fig-a\n```", 5, "fig-cap"),
        (HEAD + "```{r}\n1\n```", 5, "{python}"),
        (HEAD + "a\n\n```python\n1\n", 7, "never closed"),
        (HEAD + "::: {.callout-danger}\nx\n:::", 5, "callout-danger"),
        (HEAD + "\n::: {.panel-tabset}\nx\n:::", 6, "panel-tabset"),
        (HEAD + "See\n@fig-lost.", 6, "@fig-lost"),
        (HEAD + "See [@nobody1999].", 5, "@nobody1999"),
        (HEAD + "# A {#sec-a}\n\n# B {#sec-a}", 5, "sec-a"),
        (HEAD + "# A {#sec-a .unnumbered}\n\n@sec-a", 5, "sec-a"),
        (HEAD + "![a](lost.png)", 5, "lost.png"),
        (HEAD + "a\n<br> b", 6, "<br>"),
        (HEAD + "a [b]{.aside}", 5, "aside"),
        (HEAD + "::: {.note}\nx\n:::", 5, "'note'"),
        (HEAD + "```{python}\n#| tbl-cap: '`{python} n`'\n```", 5, "tbl-cap"),
        (HEAD + "`{python} 1 + 1`", 5, "code cell"),
        ("---\ntitle: T\nformat: docx\n---\n", 3, "format"),
    ],
)
def test_what_is_not_known_is_refused_with_file_and_line(tmp_path, capsys, text, line, named):
    assert render.main([str(project(tmp_path, text))]) == 2
    message = capsys.readouterr().err
    assert f"report.qmd:{line}:" in message and named in message
    assert not (tmp_path / "_output" / "report.html").exists()


@pytest.mark.parametrize("name", ["report.qmd", "_quarto.yml", "references.bib", "drawn.png"])
def test_a_file_without_end_is_one_message(tmp_path, capsys, name):
    path = project(tmp_path, HEAD + "![a](drawn.png)")
    (tmp_path / "drawn.png").touch()
    os.truncate(tmp_path / name, 2**36)
    assert render.main([str(path)]) == 2
    message = capsys.readouterr().err
    assert f"{name}: 68,719,476,736 bytes" in message and message.count("\n") == 1


def test_text_that_is_nested_without_end_is_one_message(tmp_path, capsys):
    assert render.main([str(project(tmp_path, HEAD + "> " * 400))]) == 2
    assert "nested more than 100 levels" in capsys.readouterr().err


def test_a_setting_that_is_not_known_is_refused_with_its_line(tmp_path, capsys):
    path = project(tmp_path, HEAD)
    settings = (tmp_path / "_quarto.yml").read_text()
    (tmp_path / "_quarto.yml").write_text(settings.replace("mathml", "mathjax"))
    assert render.main([str(path)]) == 2
    line = settings[: settings.index("html-math-method")].count("\n") + 1
    assert f"_quarto.yml:{line}: format.html.html-math-method" in capsys.readouterr().err
    (tmp_path / "_quarto.yml").write_text(settings, encoding="utf-16")
    assert render.main([str(path)]) == 2
    assert "_quarto.yml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ValueError", "UserError"])
def test_what_a_cell_says_without_end_is_cut(name, monkeypatch):
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    assert len(str(notebook.failure("here", name, "x" * 10**6, "trace"))) < 5000


def test_an_error_in_an_included_chapter_names_the_chapter(tmp_path, capsys):
    path = project(tmp_path, HEAD + "{{< include one.qmd >}}", one="text\n\n@tbl-lost\n")
    assert render.main([str(path)]) == 2
    assert "one.qmd:3: @tbl-lost" in capsys.readouterr().err
    path = project(tmp_path, HEAD + "{{< include one.qmd >}}", one="---\ntitle: x\n---\n")
    assert render.main([str(path)]) == 2
    assert "one.qmd:1:" in capsys.readouterr().err


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_failing_cell_prints_its_place_and_one_line_unless_more_is_asked_for(
    tmp_path, capsys, monkeypatch, debug
):
    monkeypatch.setenv("RLHF_DEBUG", debug)
    cell = "```{python}\nright = 1\n```\n\n```{python}\nwrong = [] [0]\n```\n"
    assert render.main([str(project(tmp_path, HEAD + cell))]) == 1
    message = capsys.readouterr().err
    assert "report.qmd:9: this cell failed: IndexError: list index out of range" in message
    assert "\x1b" not in message and ("Traceback" in message) == bool(debug)
    assert debug or message.count("\n") == 1


@pytest.mark.parametrize("where", ["```{python}\n{}\n```", "```{python}\nx\n```\n`{python} {}`"])
def test_bad_input_in_a_cell_or_expression_is_the_one_message_that_it_has(
    tmp_path, capsys, monkeypatch, where
):
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    raising = "f()"
    code = """from experiment_runs.errors import UserError
x = 1
def f():
    raise UserError("data.csv: bad, mend it")
"""
    text = where.replace("{}", raising).replace("x\n", code)
    if "`{python} " not in text:
        text = text.replace("f()", code + "f()")
    assert render.main([str(project(tmp_path, HEAD + text + "\n"))]) == 2
    message = capsys.readouterr().err
    assert message.endswith("failed: data.csv: bad, mend it\n") and message.count("\n") == 1


TRAINING = """
import dataclasses, time
from pathlib import Path
import jax.numpy as jnp
from experiment_runs.checkpoints import Checkpoints
from experiment_runs.run import ensure

@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1

def train(run):
    keeper = Checkpoints(run.checkpoints)
    for step in range(1, 2000):
        run.log(step=step)
        time.sleep(0.05)
        keeper.maybe_save(step, {"w": jnp.ones(3)}, {})

ensure("stage", Config(), train, inputs={}, root=Path(ROOT))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_stage_in_a_cell_save_itself(tmp_path, number, code):
    cell = TRAINING.replace("ROOT", repr(str(tmp_path / "results")))
    path = project(tmp_path, HEAD + f"```{{python}}\n{cell}\n```\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_report.quarto", str(path)], cwd=PROJECT, text=True,
        env=os.environ | {"RLHF_DEBUG": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not any(log.stat().st_size > 20 for log in tmp_path.glob("results/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "the same command goes on" in said and "Traceback" not in said
    (saved,) = tmp_path.glob("results/*/checkpoints/resume/*")
    (log,) = tmp_path.glob("results/*/metrics.jsonl")
    assert int(saved.name) == len(log.read_text().splitlines())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("''", "no value"), ("' '", "no value"), ("Markdown('')", "no value"),
        ("'$1 or $2'", "a dollar"),
    ],
)  # fmt: skip
def test_a_value_that_quarto_would_not_print_as_it_is_is_refused(tmp_path, capsys, value, message):
    cell = "```{python}\nfrom IPython.display import Markdown\n```\n\n"
    path = project(tmp_path, HEAD + cell + f"A value: `{{python}} {value}`.\n")
    assert render.main([str(path)]) == 2
    assert re.search(f"report.qmd:9: .*{message}", capsys.readouterr().err)


def test_escaped_text_may_hold_dollars(tmp_path):
    cell = "```{python}\nfrom rlhf_report.tables import text\n```\n\n"
    path = project(tmp_path, HEAD + cell + "It costs `{python} text('$1 or $2')`.\n")
    page, paper = render.render(path, ["html", "pdf"])
    for shown in (page_text(page.read_text()), paper_text(paper)):
        assert "It costs $1 or $2." in shown


def test_output_that_the_two_renderers_would_not_show_alike_is_refused(tmp_path, capsys):
    cells = {
        "a shortcode": 'Markdown("{{< include secret.txt >}}")',
        "text/html": 'HTML("<b>x</b>")',
        "needs a figure": "1\n",
        "3 images": "[display(Image(data=PIXEL, format='png')) for _ in range(3)]",
    }
    pixel = "89504e470d0a1a0a0000000d4948445200000001000000010800000000" + "3a7e9b55"
    label = {
        "needs a figure": "#| label: fig-a\n#| fig-cap: A\n",
        "3 images": '#| label: fig-a\n#| fig-cap: A\n#| fig-subcap: ["a", "b"]\n',
    }
    for message, code in cells.items():
        head = f"from IPython.display import *\nPIXEL = bytes.fromhex('{pixel}')\n"
        text = f"```{{python}}\n{label.get(message, '')}{head}{code}\n```\n"
        assert render.main([str(project(tmp_path, HEAD + text))]) == 2
        assert re.search(rf"report.qmd:5: .*{message}", capsys.readouterr().err)


def test_the_list_of_figures_refers_to_each_of_them():
    assert captions("fig", FIXTURE / "report.qmd").split("\n") == [
        "* @fig-parabola: A curve through $y^2$ that is *not* straight.",
        "* @fig-panels: Three panels.",
    ]


def test_a_chapter_alone_prints_references_to_others_with_a_question_mark(tmp_path):
    text = "# Alone {#sec-alone}\n\nSee @sec-alone and @sec-other, by @bradley1952paired.\n"
    page, paper = render.render(project(tmp_path, text), ["html", "pdf"])
    for shown in (page_text(page.read_text()), paper_text(paper)):
        assert "See Section 1 and ?@sec-other, by Bradley and Terry (1952)." in shown
        assert "References Bradley, Ralph Allan" in shown


def test_where_a_table_would_be_empty_its_caption_and_a_sentence_stand_in_both_outputs(tmp_path):
    cell = (
        "See @tbl-a.\n\n```{python}\n#| label: tbl-a\n#| tbl-cap: Caption-of-it.\n"
        "import pandas as pd\nfrom rlhf_report.tables import table\n"
        'table(pd.DataFrame(), empty="Nothing *was* found.")\n```\n'
    )
    page, paper = render.render(project(tmp_path, HEAD + cell), ["html", "pdf"])
    for text in (page_text(page.read_text()), paper_text(paper)):
        text = " ".join(text.split())
        assert "See Table 1." in text
        assert "Table 1: Caption-of-it. Nothing *was* found." in text


def test_generated_text_is_shown_literally_in_both_outputs_whatever_it_contains(tmp_path):
    (tmp_path / "hostile.json").write_text(json.dumps([*HOSTILE, "", " \n"]))
    cell = (
        "```{python}\nimport json, pandas as pd\nfrom IPython.display import Markdown, display\n"
        "from rlhf_report.tables import escape, quote, table\n"
        'texts = json.load(open("hostile.json"))\n'
        "for text in texts: display(Markdown(quote(text)))\n```\n\n"
        '```{python}\nfor text in texts: print(text.encode("utf8", "replace").decode())\n```\n\n'
        "```{python}\n#| label: tbl-a\n#| tbl-cap: A\n"
        'table(pd.DataFrame({"a": [escape(x[:99]) for x in texts], "b": 0.5}))\n```\n\nThe end.'
    )
    page, paper = render.render(project(tmp_path, HEAD + cell), ["html", "pdf"])
    assert "<script" not in page.read_text() and "<b>" not in page.read_text()
    solid = {"html": page_text(page.read_text()), "pdf": paper_text(paper)}
    solid = {kind: re.sub(r"\s", "", text) for kind, text in solid.items()}
    for text in HOSTILE:
        literal = INVISIBLE.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)
        literal = re.sub(r"\s", "", unicodedata.normalize("NFKC", literal))
        if len(text) > 1000:  # on paper it runs over pages, whose numbers stand between
            assert literal in solid["html"]
            assert solid["pdf"].count("x") >= 2 * len(text)
        else:
            assert literal in solid["html"] and literal in solid["pdf"]
    for text in solid.values():
        assert "(empty)" in text and "(onlywhitespace)" in text and "Theend." in text


def test_no_word_leaves_the_page(tmp_path):
    columns = ", ".join(f'"column_{k}": ["{"w" * 25}"]' for k in range(12))
    text = f"{'y' * 500}\n\n`{'z' * 500}`\n\n```\n{'v' * 500}\n```\n\n```{{python}}\n"
    text += "import pandas as pd\nfrom rlhf_report.tables import table\n"
    text += f"table(pd.DataFrame({{{columns}}}))\n```"
    (paper,) = render.render(project(tmp_path, HEAD + text), ["pdf"])
    lines = [
        line for page in pypdf.PdfReader(paper).pages for line in page.extract_text().split("\n")
    ]
    words = re.sub(r"\s", "", "".join(lines))
    assert all(letter * 500 in words for letter in "yzv") and words.count("w") >= 12 * 25
    assert max(map(len, lines)) < 140  # letters that fit between the margins


def test_a_small_table_stays_on_one_page_and_a_large_one_may_break(tmp_path):
    def cell(name, rows):
        return (
            f"```{{python}}\n#| label: tbl-{name}\n#| tbl-cap: first-{name}. [@bradley1952paired]\n"
            f'table(pd.DataFrame({{"a": [*range({rows}), "last-{name}."]}}))\n```\n\n'
        )

    setup = "```{python}\nimport pandas as pd\nfrom rlhf_report.tables import table\n```\n\n"
    small = "".join(cell(f"t{k}", 9) for k in range(10))
    text = HEAD + setup + small + cell("long", 60)
    (paper,) = render.render(project(tmp_path, text), ["pdf"])
    pages = [page.extract_text() for page in pypdf.PdfReader(paper).pages]
    assert not any("first-long." in page and "last-long." in page for page in pages)
    for name in (f"t{k}" for k in range(10)):
        assert any(f"first-{name}." in page and f"last-{name}." in page for page in pages)


def test_quotations_and_cells_survive_pandoc_unchanged():
    random = np.random.default_rng(0)
    alphabet = [*string.punctuation, *" \n\t", *"a1é—“😀", "  ", "\n\n", "http://", "{{<", "1."]
    for _ in range(60):
        text = "".join(random.choice(alphabet, size=40))
        shown = pandoc(quote(text), "-f", "markdown", "-t", "plain", "--wrap=none")
        assert squeeze(shown).replace(" ", "") == re.sub(r"\s", "", text)
        shown = pandoc(escape(text), "-f", "markdown", "-t", "plain", "--wrap=none")
        assert squeeze(shown.replace("¶", "")).replace(" ", "") == re.sub(r"\s", "", text)


def test_a_quotation_keeps_lines_paragraphs_and_indentation():
    assert quote("a\nb\n\n\n  c") == "> a\\\n> b\n>\n> \u00a0 c"
    assert quote("") == "> *(empty)*"
    assert quote("\x1b[0m") == "> ⟨U\\+001B⟩\\[0m"


def test_a_table_formats_numbers_and_escapes_text():
    frame = pd.DataFrame(
        {"na|me": ["a*b", None], "loss": [0.12345, 2e-5], "steps": [1200, 3]}, index=["x", "y"]
    )
    rows = table(frame).data.split("\n")
    assert [re.sub(r" +", " ", row) for row in rows] == [
        r"| na\|me | loss | steps |",
        "| :---- | ----: | ----: |",
        r"| a\*b | 0.123 | 1,200 |",
        "| – | 2e-05 | 3 |",
    ]


def test_columns_share_the_page_by_what_is_seen_in_them():
    """Escapes are not seen; a long text gets most of the page, a number what it needs."""
    rows = [
        {"prompt": "1", "response": "word_word " * 30, "score": 3.0, "name": "a/b"},
        {"prompt": "2", "response": "no", "score": 4.0, "name": "hallucination / toxicity"},
    ]
    widths = [len(x) - 2 for x in table(pd.DataFrame(rows)).data.split("\n")[1].split("|")[1:-1]]
    assert sum(widths) <= 121 and widths[1] > 0.5 * sum(widths)
    assert widths[3] >= len("hallucination") and widths[0] >= len("prompt")
    short = table(pd.DataFrame({"a": ["*" * 20], "b": ["x"]})).data.split("\n")[1]
    assert [len(x) - 2 for x in short.split("|")[1:-1]] == [20, 3]


def test_printed_code_refers_to_no_label():
    """The equation stands beside it; Quarto resolves no label in code."""

    def documented():
        """A quantity (Someone, 2016, eq. 16; @eq-gae). Another (@eq-ppo)."""

    shown = source(documented).data
    assert "@" not in shown and "(Someone, 2016, eq. 16). Another." in shown


def test_sections_are_numbered_as_in_the_page_and_captions_stay_with_their_tables(tmp_path):
    rows = "".join(f"| {k} |\n" for k in range(99))
    table = f"| head |\n|:--|\n{rows}\n: caption-of-it {{#tbl-a}}\n"
    for count in range(22, 28):  # somewhere there the caption comes to the foot of the page
        filler = "".join(f"Paragraph {k}.\n\n" for k in range(count))
        text = HEAD + "# A\n\n## B\n\n### C\n\n" + filler + table
        (paper,) = render.render(project(tmp_path, text), ["pdf"])
        pages = [page.extract_text() for page in pypdf.PdfReader(paper).pages]
        assert "1.1.1 C" in squeeze(pages[0])
        (page,) = [page for page in pages if "caption-of-it" in page]
        assert re.search(r"caption-of-it\s+head\s+0\s", page), count
