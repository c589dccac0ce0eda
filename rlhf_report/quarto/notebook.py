"""A Quarto document as a Jupyter notebook: includes expanded, cells checked, all of it executed.

Only the part of Quarto's syntax that the chapters use is known. Anything else is an error that
names file and line, so that the two renderers cannot drift apart in silence. Known are:

    {{< include file.qmd >}}      alone on its line; `{{{< x >}}}` prints {{< x >}}
    ```{python}                   cells with the `#|` options of CELL_OPTIONS
    `{python} expression`         a string's text, or a value's repr, or IPython's Markdown
    # Title {#sec-x}              also {.unnumbered}
    $$ ... $$ {#eq-x}             ![Caption](file.png){#fig-x fig-alt="..."}
    : Caption {#tbl-x}            below a pipe table
    @fig-x @fig-x-1 [-@fig-x] [Fig. -@fig-x] [@fig-x; @tbl-y], citations, footnotes
    ::: {.callout-note title=""}  or tip, important, caution, warning; `::: {#refs}`
"""

import ast
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop, run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from experiment_runs import settings
from experiment_runs.errors import LONGEST, UserError
from experiment_runs.files import read_whole
from experiment_runs.process import progress

CELL_OPTIONS = {
    "label": str,
    "echo": bool,
    "eval": bool,
    "include": bool,
    "output": (bool, str),
    "code-fold": bool,
    "code-summary": str,
    "fig-cap": str,
    "fig-alt": (str, list),
    "fig-subcap": list,
    "layout-ncol": int,
    "tbl-cap": str,
}
INCLUDE = re.compile(r"\{\{< include (\S+) >\}\}\s*")
SHORTCODE = re.compile(r"(?<!\{)\{\{<")
FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^`]*?)\s*")
INLINE = re.compile(r"(?<!`)`\{python\}[ \t]([^`]+)`")
REFERENCE = re.compile(
    r"\[([^\[\]@]*?)-?@((?:fig|tbl|eq|sec)-[\w-]*\w)\]|@((?:fig|tbl|eq|sec)-[\w-]*\w)"
)
CAPTION = re.compile(r"^: (.*?) *\{#(tbl-[\w-]+)\} *$", re.MULTILINE)
HEADING = re.compile(r"(#+) .*?(\{[^{}]*\})?\s*")
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours, for a terminal
STYLE = """
%matplotlib inline
%config InlineBackend.figure_formats = ["retina", "svg"]
"""  # every figure once as pixels and once as lines; the outputs take what suits them


class CellError(UserError):
    """A cell or an inline expression raised, by no fault of the input. The message holds its place,
    and the traceback where RLHF_DEBUG asks for it, which stays whole."""

    exit_code = 1

    def __init__(self, message: str):
        Exception.__init__(self, message)


class Line(NamedTuple):
    """One line of a source file."""

    text: str
    path: Path
    number: int

    @property
    def place(self) -> str:
        return f"{os.path.relpath(self.path)}:{self.number}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A document with its includes: front matter, and where each line came from."""

    path: Path
    front_matter: dict[str, Any]
    lines: list[Line]

    def place(self, token: str) -> str:
        """File and line where `token` is first written, or the file alone if it is computed."""
        pattern, shown = re.compile(re.escape(token) + r"(?![\w-])"), os.path.relpath(self.path)
        return next((x.place for x in self.lines if pattern.search(x.text)), shown)


def read(path: Path, front_matter: Mapping[str, Any] | None = None) -> Source:
    """The document at `path` with every `{{< include file >}}` replaced by the file's lines, and
    with what `front_matter` adds to its own or puts in its place."""
    text = file_lines(path)
    own: dict[str, Any] = {}
    if text and text[0].text.rstrip() == "---":
        end = next((i for i, x in enumerate(text) if i and x.text.rstrip() == "---"), None)
        if end is None:
            raise UserError(f"{text[0].place}: the front matter has no closing ---")
        block = "\n".join(line.text for line in text[1:end])
        own = parse_yaml(block, text[0].place)
        text = text[end + 1 :]
    return Source(path, own | dict(front_matter or {}), shown(expand(text)))


def shown(lines: list[Line]) -> list[Line]:
    """All lines; in a submission without the sections of class `.not-handed-in`."""
    if not settings.submission():
        return lines
    kept, within, fenced = [], 0, False  # the level of the section that is left out
    for line in lines:
        fenced ^= bool(FENCE.fullmatch(line.text))
        if not fenced and (heading := HEADING.fullmatch(line.text)):
            level = len(heading[1])
            if not within or level <= within:
                within = level if ".not-handed-in" in (heading[2] or "") else 0
        if not within:
            kept.append(line)
    return kept


def expand(lines: list[Line], within: tuple[Path, ...] = ()) -> list[Line]:
    """The lines with includes in their place; a path is relative to the file that names it."""
    expanded = []
    for line in lines:
        if not (match := INCLUDE.fullmatch(line.text)):
            expanded.append(line)
            continue
        path = line.path.parent / match[1]
        if not path.is_file():
            raise UserError(f"{line.place}: cannot include {match[1]}: there is no {path}")
        inside = (*within, line.path.resolve())
        if path.resolve() in inside:
            raise UserError(f"{line.place}: {match[1]} includes itself; remove the line")
        included = file_lines(path)
        if included and included[0].text.rstrip() == "---":
            raise UserError(f"{included[0].place}: an included file carries no YAML; remove it")
        expanded += expand(included, inside)
    return expanded


def file_lines(path: Path) -> list[Line]:
    try:
        text = read_whole(path).decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return [Line(line, path, number) for number, line in enumerate(text.split("\n"), start=1)]


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that cannot be
        raise UserError(f"{place}: this YAML cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: expected `key: value` lines, got {text!r}")
    return values


def build(source: Source, defaults: dict[str, Any]) -> NotebookNode:
    """The notebook of a document: markdown and code cells that know their place and options."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    for kind, lines in split(source):
        if kind == "code":
            notebook.cells.append(code_cell(lines, defaults))
        elif text := "\n".join(line.text for line in lines).strip("\n"):
            notebook.cells.append(nbformat.v4.new_markdown_cell(text))
        for line in lines if kind == "markdown" else ():
            if SHORTCODE.search(line.text):
                raise UserError(
                    f"{line.place}: unknown shortcode; only include is known, alone on its line "
                    "(to print one, write {{{< ... >}}})"
                )
    inline = next((line for line in source.lines if INLINE.search(line.text)), None)
    if inline and all(x.cell_type == "markdown" for x in notebook.cells):
        raise UserError(f"{inline.place}: an inline expression needs a code cell in its document")
    return notebook


def split(source: Source) -> list[tuple[str, list[Line]]]:
    """Runs of lines, Markdown or code; a code cell keeps its opening fence and loses the other."""
    runs: list[tuple[str, list[Line]]] = [("markdown", [])]
    fence, opened = "", None
    for line in source.lines:
        match = FENCE.fullmatch(line.text)
        if not fence and match:
            fence, opened = match[2], line
            if match[3].startswith("{") and not match[3].startswith(("{.", "{=")):
                if match[3] != "{python}" or match[1]:
                    raise UserError(f"{line.place}: only an unindented ```{{python}} cell is known")
                runs.append(("code", []))
        elif fence and match and match[2].startswith(fence) and not match[3]:
            fence = ""
            if runs[-1][0] == "code":
                runs.append(("markdown", []))
                continue
        runs[-1][1].append(line)
    if fence:
        raise UserError(f"{opened.place}: this fence is never closed")
    return runs


def code_cell(lines: list[Line], defaults: dict[str, Any]) -> NotebookNode:
    """A code cell from its opening fence and its body; `#|` lines are options, kept as comments."""
    place, body = lines[0].place, lines[1:]
    options = parse_yaml("\n".join(x.text[2:] for x in body if x.text.startswith("#|")), place)
    for key, value in options.items():
        if key not in CELL_OPTIONS:
            known = ", ".join(CELL_OPTIONS)
            raise UserError(f"{place}: unknown cell option {key!r}; known are {known}")
        wrong_output = key == "output" and value not in (True, False, "asis")
        if INLINE.search(str(value)):
            raise UserError(f"{place}: cell option {key}: Quarto computes nothing in an option")
        if not isinstance(value, CELL_OPTIONS[key]) or wrong_output:
            raise UserError(f"{place}: cell option {key}: {value!r} is not a value it can have")
    label = options.get("label", "")
    for kind in ("fig", "tbl"):
        if label.startswith(f"{kind}-") != (f"{kind}-cap" in options):
            raise UserError(f"{place}: a label that begins with {kind}- and {kind}-cap go together")
    cell = nbformat.v4.new_code_cell("\n".join(x.text for x in body))
    cell.metadata.update(place=place, options=defaults | options)
    return cell


def execute(notebook: NotebookNode, source: Source, root: Path) -> None:
    """Run all cells and inline expressions in order, in a fresh kernel of this interpreter."""
    if all(cell.cell_type == "markdown" for cell in notebook.cells):
        return
    # No kernel directory: jupyter_client then makes the kernel of the running interpreter.
    kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
        timeout=None,
        coalesce_streams=True,
        resources={"metadata": {"path": str(root)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.owns_km = True  # nbclient stops the kernel when it leaves the block
    with client.setup_kernel():
        try:
            client.wait_for_reply(client.kc.execute(STYLE, silent=True))
            for index, cell in enumerate(
                progress(notebook.cells, label=f"render {source.path.name}")
            ):
                if cell.cell_type == "markdown":
                    cell.source = INLINE.sub(lambda m: evaluate(client, m[1], source), cell.source)
                elif cell.metadata.options.get("eval", True):
                    execute_cell(client, cell, index)
        except KeyboardInterrupt:
            interrupt(client)
            raise


def execute_cell(client: NotebookClient, cell: NotebookNode, index: int) -> None:
    place = cell.metadata.place
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        raise failure(f"{place}: this cell failed", error.ename, error.evalue, str(error)) from None
    except DeadKernelError as error:
        raise CellError(f"{place}: this cell ended its process, or the system did") from error


def failure(what: str, name: str, message: str, trace: str) -> UserError:
    """The error that a cell's error stands for: bad input, which has a message, or a defect."""
    debug = f"\n{ANSI.sub('', trace)}" if settings.debugging() else ""
    if name in ("UserError", "FloatingPointError"):
        return UserError(f"{what}: {message}{debug}")
    hint = debug or "; RLHF_DEBUG=1 shows where"
    return CellError(f"{what}: {name}: {message:.{LONGEST}}{hint}")


def interrupt(client: NotebookClient) -> None:
    """Stops the cell that runs and waits for it: a stage that it trains saves itself first."""
    # What the cell then raises belongs to nobody, and must not be shown.
    ensure_event_loop().set_exception_handler(lambda loop, context: None)
    run_sync(client.km.interrupt_kernel)()
    client.wait_for_reply(client.kc.execute("", silent=True))


def evaluate(client: NotebookClient, expression: str, source: Source) -> str:
    """The Markdown that an inline expression stands for: a string's text, or any value's repr.

    Quarto prints an expression without a value as its source, and takes what stands between two
    dollars in a string for mathematics: both are refused.
    """
    message = client.kc.execute("", silent=True, user_expressions={"value": expression.strip()})
    result = client.wait_for_reply(message)["content"]["user_expressions"]["value"]
    place = source.place(f"`{{python}} {expression}`".split("\n")[0])
    if result["status"] != "ok":
        what = f"{place}: the inline expression {expression!r} failed"
        raise failure(what, result["ename"], result["evalue"], "\n".join(result["traceback"]))
    text = result["data"].get("text/markdown", result["data"]["text/plain"])
    is_string = "text/markdown" not in result["data"] and text[:1] in "'\""
    value = ast.literal_eval(text) if is_string else text
    if not value.strip():
        raise UserError(f"{place}: the inline expression {expression!r} has no value to print")
    if is_string:
        if "$" in value:
            raise UserError(
                f"{place}: the inline expression {expression!r} has a dollar, which Quarto takes "
                "for mathematics; make it Markdown, with the dollar escaped"
            )
        return re.sub(r"([\\`*_{}\[\]()>#+\-.!$~^@<|])", r"\\\1", value)
    return text


def captions(kind: str, path: Path) -> str:
    """A Markdown list of a document's figures ("fig") or tables ("tbl"): their first sentences.

    Neither Typst nor HTML gets such a list from Quarto, so a cell shows this one in both outputs.
    """
    labelled: dict[str, str] = {}
    for cell in build(read(path), {}).cells:
        options = cell.metadata.get("options", {})
        if f"{kind}-cap" in options:
            labelled[options["label"]] = options[f"{kind}-cap"]
        elif cell.cell_type == "markdown" and kind == "tbl":
            labelled |= {label: text for text, label in CAPTION.findall(cell.source)}
    first = {label: re.split(r"(?<=[.?!]) ", text)[0] for label, text in labelled.items()}
    return "\n".join(f"* @{label}: {sentence}" for label, sentence in first.items())
