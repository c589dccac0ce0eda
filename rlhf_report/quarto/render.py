"""Render a Quarto document without Quarto: `python -m rlhf_report.quarto report.qmd`.

The document runs once, in a Jupyter kernel; the self-contained HTML page, the PDF (set by typst)
and the executed notebook are written from that one run.
"""

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import typst
import yaml

from experiment_runs.command import concluded
from experiment_runs.errors import UserError
from rlhf_report.quarto import document, notebook
from rlhf_report.quarto.document import Node, element, pandoc, string, walk, words
from rlhf_report.quarto.fonts import FOLDER, boxes
from rlhf_report.quarto.notebook import Source
from rlhf_report.quarto.publish import publish

ASSETS = Path(__file__).parent / "assets"
FORMATS = {"html": "html", "typst": "pdf", "pdf": "pdf", "ipynb": "ipynb"}
LINE = 120  # characters; in a table with longer lines the columns have the widths of its source
SMALLEST_LETTERS = 8  # points, in tables
SMALL_TABLE = 20, 1200  # rows and characters; a table of no more stays on one page
ANY = object()
TOC = {"toc": ANY, "toc-depth": ANY, "number-sections": ANY}
# What _quarto.yml may say: any value, the one value that is implemented here, or nested keys.
SETTINGS: Node = {
    "project": {"type": "default", "output-dir": ANY, "execute-dir": "project", "render": ANY},
    "format": {
        "html": TOC
        | {"embed-resources": True, "html-math-method": "mathml", "code-fold": ANY}
        | {"theme": ANY, "respect-user-color-scheme": True},  # for Quarto; here assets/report.css
        "typst": TOC
        | {"papersize": ANY, "margin": ANY, "mainfont": ANY, "fontsize": ANY}
        | {"citeproc": True, "link-citations": True, "date-format": "long"}
        | {"section-numbering": ANY}
        | {"syntax-highlighting": ANY, "include-in-header": ANY},  # for Quarto; here report.typ
    },
    "execute": {"echo": ANY, "warning": False},
    "bibliography": ANY,
    "jupyter": "python3",
    "lang": ANY,
}
FRONT_MATTER = {
    key: ANY for key in ("title", "subtitle", "author", "date", "abstract", "lang", "keywords")
}


def render(
    path: Path,
    formats: Sequence[str],
    output: Path | None = None,
    *,
    front_matter: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Execute the document at `path` once and write it in each of `formats`.

    Args:
      path: the document.
      formats: names in `FORMATS`.
      output: folder to write to, instead of the one in _quarto.yml.
      front_matter: what is added to the document's own, or takes its place. `keywords` are in
        the metadata of every output, where a program finds them.

    Raises:
      UserError: the document says something that is not known here; names file and line.
      CellError: a cell failed; holds its file, line and traceback.
    """
    path = path.resolve()
    root = next((x for x in path.parents if (x / "_quarto.yml").is_file()), None)
    if root is None:
        raise UserError(f"{path}: there is no _quarto.yml beside or above it")
    settings = project_settings(root / "_quarto.yml")
    source = notebook.read(path, front_matter or {})
    check_known(source.front_matter, FRONT_MATTER, path)
    fold = settings.get("format", {}).get("html", {}).get("code-fold", False)
    defaults = {"echo": settings.get("execute", {}).get("echo", True), "code-fold": fold}
    cells = notebook.build(source, defaults)
    notebook.execute(cells, source, root)

    target = output or root / settings.get("project", {}).get("output-dir", ".")
    target = (target / path.relative_to(root)).with_suffix("")
    target.parent.mkdir(parents=True, exist_ok=True)
    bibliography = root / settings["bibliography"] if "bibliography" in settings else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree, names = document.compose(cells, source, bibliography, folder)
        arguments = pandoc_arguments(source, settings, bibliography, folder)
        arguments += keyword_variables(source)
        options = settings.get("format", {})
        contents = {
            "html": lambda: html(tree, options.get("html", {}), folder, arguments).encode(),
            "pdf": lambda: pdf(tree, options.get("typst", {}), folder, arguments),
            "ipynb": lambda: publish(cells, source, names, bibliography).encode(),
        }
        written = []
        for kind in dict.fromkeys(FORMATS[x] for x in formats):
            written.append(target.with_name(f"{target.name}.{kind}"))
            written[-1].write_bytes(contents[kind]())
    return written


# Settings --------------------------------------------------------------------------------------


def project_settings(path: Path) -> Node:
    lines = notebook.file_lines(path)
    settings = notebook.parse_yaml("\n".join(line.text for line in lines), str(path))
    check_known(settings, SETTINGS, path)
    return settings


def check_known(values: Node, known: Node, path: Path, inside: str = "") -> None:
    """Refuse what is not implemented, with the line that asks for it."""
    for key, value in values.items():
        allowed = known.get(key)
        if isinstance(allowed, dict) and isinstance(value, dict):
            check_known(value, allowed, path, f"{inside}{key}.")
        elif allowed is not ANY and (allowed is None or allowed != value):
            lines = path.read_text(encoding="utf-8").split("\n")
            pattern = re.compile(rf"\s*{re.escape(str(key))}\s*:")
            line = next((n for n, x in enumerate(lines, start=1) if pattern.match(x)), 1)
            remedy = f"known are {', '.join(known)}" if allowed is None else f"use {allowed!r}"
            raise UserError(
                f"{os.path.relpath(path)}:{line}: {inside}{key}: {value!r} is not known; {remedy}"
            )


def pandoc_arguments(
    source: Source, settings: Node, bibliography: Path | None, folder: Path
) -> list[str]:
    """Pandoc's arguments for the title block and the citations."""
    values = {"lang": settings.get("lang", "en"), "link-citations": True} | source.front_matter
    if values.get("date") == "today":
        values["date"] = datetime.date.today()
    if isinstance(day := values.get("date"), datetime.date):
        values["date"] = f"{day:%B} {day.day}, {day.year}"
    authors = values.get("author", [])
    values["author"] = authors if isinstance(authors, list) else [authors]
    if not source.front_matter:
        values |= {"pagetitle": source.path.stem, "reference-section-title": "References"}
    (folder / "metadata.yml").write_text(yaml.safe_dump(values), encoding="utf-8")
    arguments = [f"--metadata-file={folder / 'metadata.yml'}"]
    return arguments + ([f"--bibliography={bibliography}", "--citeproc"] if bibliography else [])


def writer_arguments(options: Node) -> list[str]:
    arguments = [f"--toc-depth={options.get('toc-depth', 3)}"]
    arguments += ["--toc"] if options.get("toc") else []
    return arguments + (["--number-sections"] if options.get("number-sections") else [])


# HTML ------------------------------------------------------------------------------------------


def html(tree: Node, options: Node, folder: Path, arguments: list[str]) -> str:
    """One page with everything in it."""
    return pandoc(
        json.dumps(tree | {"blocks": walk(tree["blocks"], html_block)}),
        *("-f", "json", "-t", "html5", "--standalone", "--mathml", "--embed-resources"),
        f"--template={ASSETS / 'report.html'}",
        f"--css={ASSETS / 'report.css'}",
        f"--resource-path={folder}",
        *writer_arguments(options),
        *arguments,
    )


def html_block(node: Node) -> Node | list[Node] | None:
    if node["t"] == "CodeBlock" and (summary := take_summary(node)):
        opening = f'<details class="code"><summary>{escape(summary)}</summary>'
        return [raw("html", opening), node, raw("html", "</details>")]
    if node["t"] == "Table":
        return element("Div", [["", ["table"], []], [automatic_widths(node)]])
    if node["t"] != "Div":
        return None
    (label, classes, pairs), content = node["c"]
    if "equation" in classes:
        number = element("Span", [["", ["number"], []], [string(f"({dict(pairs)['number']})")]])
        content = [element("Plain", [*content[0]["c"], number])]
        return element("Div", [[label, classes, []], content])
    if "panels" in classes:
        style = [["style", f"--columns: {dict(pairs)['columns']}"]]
        return element("Div", [[label, classes, style], content])
    return None


# PDF -------------------------------------------------------------------------------------------


def pdf(tree: Node, options: Node, folder: Path, arguments: list[str]) -> bytes:
    """The pages, set by typst with the fonts that typst and matplotlib carry."""
    text = pandoc(
        json.dumps(tree | {"blocks": walk(tree["blocks"], typst_block)}),
        *("-f", "json", "-t", "typst", "--standalone"),
        f"--template={ASSETS / 'report.typ'}",
        *typst_variables(options),
        *writer_arguments(options),
        *arguments,
    )
    (folder / "report.typ").write_text(text, encoding="utf-8")
    if missing := boxes(text):
        shown = " ".join(missing[:20])
        print(
            f"warning: the PDF has boxes in place of {shown}, which no font here has; install one "
            "that does, such as Noto CJK or Noto Emoji, and render again",
            file=sys.stderr,
        )
    try:
        return typst.compile(folder / "report.typ", root=folder, font_paths=[FOLDER])
    except typst.TypstError as error:
        raise UserError(f"typst cannot set this document: {error}") from error


def typst_variables(options: Node) -> list[str]:
    sides = options.get("margin", {"x": "2.3cm", "y": "2.5cm"})
    numbering = typst_string(options.get("section-numbering", "1.1"))
    variables = {
        "papersize": options.get("papersize", "a4"),
        "margin": ", ".join(f"{side}: {length}" for side, length in sides.items()),
        "mainfont": options.get("mainfont", "Libertinus Serif"),
        "fontsize": options.get("fontsize", "10.5pt"),
        "numbering": numbering if options.get("number-sections") else "none",
    }
    return [f"--variable={key}:{value}" for key, value in variables.items()]


def keyword_variables(source: Source) -> list[str]:
    """The keywords as they are: a template writes them where no markup is understood."""
    return [f"--variable=keyword:{x}" for x in source.front_matter.get("keywords", [])]


def typst_block(node: Node) -> Node | list[Node] | None:
    if node["t"] == "CodeBlock":
        take_summary(node)
    if node["t"] == "Image":
        (_, _, pairs), alt, (path, _) = node["c"]
        width = dict(pairs).get("width", "")  # without one: natural size, or the column if smaller
        options = [typst_string(path), f"alt: {typst_string(words(alt))}"]
        options += [f"width: {width}"] if width.endswith("%") else []
        return inline(raw("typst", f"#box(image({', '.join(options)}))"))
    if node["t"] == "Table":
        return typst_table(node)
    if node["t"] != "Div":
        return None
    (label, classes, pairs), content = node["c"]
    if "equation" in classes:
        number = dict(pairs)["number"]
        opening = f'#[#set math.equation(numbering: _ => "({number})");'
        inlines = [raw("typst", opening), *content[0]["c"], raw("typst", f"<{label}>]")]
        return element("Para", [inline(x) for x in inlines])
    if "panels" in classes:
        columns = dict(pairs)["columns"]
        opening = raw("typst", f"#grid(columns: (1fr,) * {columns}, gutter: 1em, align: bottom)[")
        between = [x for panel in content for x in (raw("typst", "]["), panel)]
        return [opening, *between[1:], raw("typst", "]")]
    if "callout" in classes:
        title, *body = content
        opening = raw("typst", f'#callout("{classes[1].removeprefix("callout-")}")[')
        return [opening, *title["c"][1], raw("typst", "]["), *body, raw("typst", "]")]
    return None


def typst_table(table: Node) -> list[Node]:
    """A table in letters that suit its columns, on one page if it is small."""
    columns = len(table["c"][2])
    size = max(SMALLEST_LETTERS, 9.5 - 0.5 * max(0, columns - 4))
    opening = f"#breakable({max(6, 90 // columns)})[#show table: set text(size: {size}pt)"
    rows = sum(len(body[3]) for body in table["c"][4])
    if rows <= SMALL_TABLE[0] and len(words(table)) <= SMALL_TABLE[1]:
        opening += "\n#show figure: set block(breakable: false)"
    if line_length(table) <= LINE:
        table = automatic_widths(table)
    return [raw("typst", opening), table, raw("typst", "]")]


def line_length(table: Node) -> int:
    """Characters of the longest cells of all columns together."""
    _, _, columns, head, bodies, _ = table["c"]
    rows = [row for row in head[1]] + [row for body in bodies for row in body[3]]
    lengths = [[len(words(cell[4])) for cell in row[1]] for row in rows]
    return sum(max(column) for column in zip(*lengths, strict=True)) if columns else 0


def typst_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


# Both ------------------------------------------------------------------------------------------


def raw(kind: str, text: str) -> Node:
    return element("RawBlock", [kind, text])


def inline(node: Node) -> Node:
    return node | {"t": "RawInline"} if node["t"] == "RawBlock" else node


def take_summary(code: Node) -> str:
    """The summary under which a cell's code is folded, taken off its attributes."""
    attributes = code["c"][0]
    summary = dict(attributes[2]).get("code-summary", "")
    attributes[2] = []
    return summary


def automatic_widths(table: Node) -> Node:
    """The table without the column widths that pandoc guesses from the width of the source."""
    for column in table["c"][2]:
        column[1] = element("ColWidthDefault")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_report.quarto", description=__doc__)
    parser.add_argument("document", type=Path, help="report.qmd, or one chapter")
    parser.add_argument(
        "--to",
        action="append",
        choices=FORMATS,
        help="html, typst or pdf (the same), ipynb; may be given several times (html and pdf)",
    )
    parser.add_argument("--output-dir", type=Path, help="instead of the one in _quarto.yml")
    options = parser.parse_args(arguments)

    def work() -> None:
        for file in render(options.document, options.to or ["html", "pdf"], options.output_dir):
            print(f"wrote {file}")

    return concluded(work)
