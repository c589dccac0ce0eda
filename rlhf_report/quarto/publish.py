"""The executed notebook as a file for readers, who see what the two pages show.

A Jupyter page knows nothing of Quarto's Markdown: labels become numbers, citations become names and
years with the list of what they cite at the end, and captions stand beside what they describe.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from experiment_runs import settings
from rlhf_report.quarto.document import bibliography_keys, is_div, pandoc, words
from rlhf_report.quarto.notebook import CAPTION, REFERENCE, Source

NUMBERED = re.compile(r"^(#+) (.*?) *\{#(sec-[\w-]+)[^{}]*\} *$", re.MULTILINE)
EQUATION = re.compile(r"\s*\$\$ *\{#(eq-[\w-]+)\}")
PLAIN = (  # what a Jupyter page shows in place of Quarto's Markdown
    (r"^:{3,} *\{\.callout-\w+ title=\"(.*)\"\} *$", r"**\1**\n"),
    (r"^:{3,} *\{\.callout-(\w+)\} *$", r"**\1**\n"),
    (r"^:{3,}.*$", ""),
    (r" *\{[#.][^{}\n]*\} *$", ""),  # as in `# Title {.unnumbered}`
)
OPTION = re.compile(r"^#\|.*\n?", re.MULTILINE)
KEY = r"[A-Za-z][\w:.-]*\w"
CITATION = re.compile(rf"\[[^\[\]]*?-?@{KEY}[^\[\]]*\]|(?<![\w@])@{KEY}")


def publish(
    notebook: NotebookNode, source: Source, names: Mapping[str, str], bibliography: Path | None
) -> str:
    """The executed notebook without messages, its figures as pixels, with the settings of its run.

    Args:
      notebook: as it was executed.
      source: the document that it was made of.
      names: what each label is called, e.g. "Figure 1".
      bibliography: where the sources of citations stand.
    """
    public = nbformat.v4.new_notebook(metadata=notebook.metadata)
    if keywords := source.front_matter.get("keywords"):
        public.metadata["keywords"] = list(keywords)
    public.cells += [*title_cell(source), settings_cell(settings.asked())]
    for cell in notebook.cells:
        public.cells += reader_cells(cell, names)
    cite(public, bibliography)
    for number, cell in enumerate(public.cells):
        cell.id = f"cell-{number}"
    return nbformat.writes(public)


def title_cell(source: Source) -> list[NotebookNode]:
    """Title and authors; nothing for a chapter, which has none of its own."""
    if not (title := source.front_matter.get("title")):
        return []
    authors = source.front_matter.get("author", [])
    byline = [authors] if isinstance(authors, str) else authors
    return [nbformat.v4.new_markdown_cell("\n\n".join([f"# {title}", *byline]))]


def settings_cell(values: Mapping[str, str]) -> NotebookNode:
    """What the environment asked for, as code: executed again, the notebook shows the same runs."""
    code = "\n".join([
        "import os", "", "from experiment_runs.settings import PROJECT", "",
        "os.chdir(PROJECT)  # wherever this notebook lies",
        "os.environ.update(  # which runs are shown; what is empty is not asked for",
        *(f"    {name}={value!r}," for name, value in values.items()), ")",
    ])  # fmt: skip
    return nbformat.v4.new_code_cell(code, execution_count=0)


def reader_cells(cell: NotebookNode, names: Mapping[str, str]) -> list[NotebookNode]:
    """A cell as readers see it, with its caption below a figure and above a table."""
    if cell.cell_type == "markdown":
        return [nbformat.v4.new_markdown_cell(reader_text(cell.source, names))]
    options, code = cell.metadata.options, OPTION.sub("", cell.source).strip("\n")
    if not options.get("eval", True):
        return [nbformat.v4.new_markdown_cell(f"```python\n{code}\n```")]
    outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    texts = [
        data["text/markdown"] for x in outputs if "text/markdown" in (data := x.get("data", {}))
    ]
    if any(label in names for text in texts for label in labels(text)):
        # a list of figures: numbers are known here, and not where the notebook runs again
        return [nbformat.v4.new_markdown_cell(in_words(text, names)) for text in texts]
    for data in (output.get("data", {}) for output in outputs):
        data.pop("image/svg+xml", None)
    shown = [nbformat.v4.new_code_cell(code, execution_count=cell.execution_count, outputs=outputs)]
    label = options.get("label", "")
    for kind, place in (("fig-", 1), ("tbl-", 0)):
        if label.startswith(kind):
            text = f"**{names[label]}:** {in_words(options[f'{kind}cap'], names)}"
            shown.insert(place, nbformat.v4.new_markdown_cell(text))
    return shown


def reader_text(text: str, names: Mapping[str, str]) -> str:
    """Markdown of a document as plain Markdown, with the numbers that its labels stand for."""

    def number(label: str) -> str:
        return names[label].split("\u00a0")[-1]

    text = NUMBERED.sub(lambda m: f"{m[1]} {number(m[3])} {m[2]}", text)
    text = EQUATION.sub(lambda m: f" \\tag{{{number(m[1])}}}\n$$", text)
    text = CAPTION.sub(lambda m: f"**{names[m[2]]}:** {m[1]}", text)
    text = in_words(text, names)
    for pattern, plain in PLAIN:
        text = re.sub(pattern, plain, text, flags=re.MULTILINE)
    return text


def in_words(text: str, names: Mapping[str, str]) -> str:
    """References in words: "Figure 1", or the number alone where it stands in brackets."""

    def word(match: re.Match) -> str:
        before, bracketed, bare = match.groups()
        if bare:
            return names.get(bare, match[0])
        return before + names.get(bracketed, match[0]).split("\u00a0")[-1]

    return REFERENCE.sub(word, text)


def labels(text: str) -> list[str]:
    """The labels that a text refers to."""
    return [label for pair in REFERENCE.findall(text) for label in pair[1:] if label]


def cite(public: NotebookNode, bibliography: Path | None) -> None:
    """Puts names and years in place of citations, and the list of what they cite at the end."""
    keys = bibliography_keys(bibliography)
    prose = [cell for cell in public.cells if cell.cell_type == "markdown"]
    cited = [token for cell in prose for token in CITATION.findall(cell.source)]
    cited = [x for x in dict.fromkeys(cited) if set(re.findall(f"@({KEY})", x)) <= keys]
    if not cited:
        return
    resolved, references = citations(cited, bibliography)
    for cell in prose:
        cell.source = CITATION.sub(lambda m: resolved.get(m[0], m[0]), cell.source)
    if not any(re.match("#+ References", cell.source) for cell in prose):
        public.cells.append(nbformat.v4.new_markdown_cell("## References"))
    public.cells[-1].source = "\n".join([public.cells[-1].source.rstrip(), "", *references])


def citations(cited: Sequence[str], bibliography: Path) -> tuple[dict[str, str], list[str]]:
    """What pandoc makes of each citation, and the items of the list of references."""
    text = "\n\n".join([*cited, "::: {#refs}\n:::"])
    arguments = ("-f", "markdown", "-t", "json", "--citeproc", f"--bibliography={bibliography}")
    *paragraphs, listed = json.loads(pandoc(text, *arguments))["blocks"]
    assert is_div(listed, "references")
    resolved = dict(zip(cited, map(words, paragraphs), strict=True))
    return resolved, [f"* {words(entry)}" for entry in listed["c"][1]]
