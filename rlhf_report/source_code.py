"""A notebook that needs no project beside it: its first cells write the modules that it runs.

Every module that the code of the notebook imports, directly or through others, becomes a cell that
shows it and writes it into a folder beside the notebook. Those that the report is about come first
and stand open; the others are folded in Jupyter.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from experiment_runs.assignment import PATH
from experiment_runs.settings import PROJECT, RESULTS, SOURCES

FOLDER = "source_code"
BESIDE = re.compile(r"with_name\(\"(\w+\.py)\"\)")  # a program that is run as a file
PACKAGES = ("rlhf_jax", "gan_jax", "experiment_runs", "rlhf_report")
OPEN = (  # what the report is about, in its order
    "rlhf_jax/objectives", "rlhf_jax/reward_model/", "rlhf_jax/ppo/", "rlhf_jax/evaluation/",
    "rlhf_jax/language_model/", "gan_jax/dcgan", "gan_jax/training",
)  # fmt: skip
DATA = (  # what modules read
    PATH, RESULTS / "measured" / "invariants.json", PROJECT / "tests" / "faults.csv",
)  # fmt: skip
INTRODUCTION = f"""\
## Source code

This notebook stands alone: with the packages of `requirements.lock` its first cells write the
modules below into the folder `{FOLDER}` beside it, and everything after them runs that code. The
numbers in the text are those of the runs that are handed in; tables and figures are made again.
"""
BEGIN = f"""\
import os
import sys
from pathlib import Path

if Path.cwd().name != "{FOLDER}":
    Path("{FOLDER}").mkdir(exist_ok=True)
    os.chdir("{FOLDER}")
sys.path.insert(0, os.getcwd())  # before any installed copy
"""


def source_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Cells that write all that a notebook imports of this project, with headings."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    paths = sorted(imported_files(code), key=rank)
    folders = sorted({str(place(path).parent) for path in (*paths, *DATA)})
    making = f"for folder in {folders}:\n    Path(folder).mkdir(parents=True, exist_ok=True)"
    cells = [
        prose(INTRODUCTION),
        nbformat.v4.new_code_cell(f"{BEGIN}\n{making}", execution_count=0, outputs=[]),
    ]
    for path in (*paths, *DATA):
        name = place(path)
        cells.append(prose(f"### `{name}`\n\n{first_sentence(path)}".strip()))
        cell = nbformat.v4.new_code_cell(
            f"%%writefile {name}\n{path.read_text(encoding='utf-8')}", execution_count=0, outputs=[]
        )
        if not str(name).startswith(OPEN):
            cell.metadata["jupyter"] = {"source_hidden": True}
        cells.append(cell)
    return cells


def prose(text: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(text)


def place(path: Path) -> Path:
    """Where a file lies in the project."""
    return path.relative_to(SOURCES)


def rank(path: Path) -> tuple[int, int, str]:
    """What the report is about comes first, in its order; then packages and files by name."""
    name = str(place(path))
    subject = next((k for k, start in enumerate(OPEN) if name.startswith(start)), len(OPEN))
    return subject, PACKAGES.index(place(path).parts[0]), name


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    if path.suffix != ".py":
        return ""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def imported_files(code: Iterable[str]) -> set[Path]:
    """The files of this project that some code imports, those that these import, and the programs
    beside them that they name and run."""
    left, found = [*code], set()
    while left:
        for path in files_of(imported_names(left.pop())) - found:
            text = path.read_text(encoding="utf-8")
            beside = {path.with_name(name) for name in BESIDE.findall(text)}
            for file in {path} | {own for own in beside if own.is_file()}:
                found.add(file)
                left.append(file.read_text(encoding="utf-8"))
    return found


def imported_names(code: str) -> Sequence[str]:
    """Dotted names of all that a text of Python imports, wherever in it; Jupyter's lines aside."""
    lines = [line for line in code.split("\n") if not line.startswith(("%", "!"))]
    names = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files_of(names: Iterable[str]) -> set[Path]:
    """The files behind dotted names, with the packages that they lie in."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] not in PACKAGES:
            continue
        for count in range(1, len(parts) + 1):
            path = SOURCES.joinpath(*parts[:count])
            for file in (path / "__init__.py", path.with_suffix(".py")):
                if file.is_file():
                    found.add(file)
    return found
