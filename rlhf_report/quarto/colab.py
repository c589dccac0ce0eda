"""The report as a notebook for Google Colab: `python -m rlhf_report.quarto.colab`.

It installs, trains with progress bars, keeps results on the user's drive, where the next session
goes on, and then shows the chapters cell by cell. Made from report.qmd, without outputs.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from IPython.display import Markdown, display
from nbformat import NotebookNode

from experiment_runs.command import concluded
from experiment_runs.settings import PROJECT
from rlhf_report.quarto import document, notebook, publish

INTRODUCTION = """# Learning from human preferences, in JAX

Choose a GPU in *Runtime > Change runtime type*. A T4 has 16 GB and no bfloat16, so that it computes
in float32: the profiles `tiny`, `cpu` and `study` fit (11.4 GB at most in the committed runs); for
`assignment` an L4 or A100 is the better choice.

Run the cells in order. Where Colab asks to restart the session after the installation, do so and
begin again at the settings. Results lie on your drive: when a session ends, the same cells go on
from there in the next one."""
SETTINGS = """#@title Settings
REPOSITORY = ""  #@param {type:"string"}
PROFILE = "cpu"  #@param ["tiny", "cpu", "study", "assignment"]
STUDENT_ID = ""  #@param {type:"string"}
KEEP = "rlhf-jax"  #@param {type:"string"}

import os
from pathlib import Path

try:
    from google.colab import drive
except ImportError:  # not on Colab: beside this notebook
    kept = Path(KEEP).resolve()
else:
    drive.mount("/content/drive")
    kept = Path("/content/drive/MyDrive", KEEP)
kept.mkdir(parents=True, exist_ok=True)
os.environ |= {
    "RLHF_PROFILE": PROFILE, "RLHF_STUDENT_ID": STUDENT_ID, "RLHF_PROGRESS": "1",
    "RLHF_RESULTS": str(kept / "results"),
}
print("results:", kept / "results")"""
INSTALL = """#@title Installation
import shutil, subprocess, sys

SOURCES = Path("rlhf-jax-sources")
if not SOURCES.exists():
    assert REPOSITORY, "write into the settings' REPOSITORY where this project is cloned from"
    !git clone --quiet {REPOSITORY} {SOURCES}
%pip install --quiet -r {SOURCES}/requirements.lock
%pip install --quiet --no-deps PACKAGES --editable {SOURCES}
if shutil.which("nvidia-smi"):
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.partition(".")[0]
    cuda = "cuda13" if driver.isdecimal() and int(driver) >= 580 else "cuda12"
    %pip install --quiet "jax[{cuda}]==VERSION"
sys.path.insert(0, str(SOURCES.resolve()))
os.environ |= {"PYTHONPATH": str(SOURCES.resolve())}
os.chdir(SOURCES)"""
TRAINING = """#@title Training, with progress; what is finished is not trained again
import sys

for command in ("rlhf_jax check", "gan_jax train", "rlhf_jax run"):
    !{sys.executable} -m {command}
    assert _exit_code == 0, command"""
REPORT = """#@title The report, as a page and as PDF, on the drive
!{sys.executable} -m rlhf_report.quarto report.qmd --output-dir "{kept}\""""
FIGURE, TABLE = {"image/png": ""}, {"text/markdown": "| a |\n|---|\n| b |"}  # stand-ins


def colab(path: Path) -> NotebookNode:
    """The notebook of the document at `path`, to be executed on Colab."""
    source = notebook.read(path)
    cells = notebook.build(source, {"echo": True, "code-fold": False})
    bibliography = path.parent / "references.bib"
    names = numbers(cells, source, bibliography)
    made = nbformat.v4.new_notebook(metadata=cells.metadata)
    made.metadata["accelerator"] = "GPU"
    made.cells.append(nbformat.v4.new_markdown_cell(INTRODUCTION))
    for text, tag in ((SETTINGS, "settings"), (installation(), "install"), (TRAINING, "train")):
        made.cells.append(code(text, tag))
    for cell in cells.cells:
        if "captions(" not in cell.source:  # a list of figures, whose numbers are known here alone
            made.cells += publish.reader_cells(cell, names)
    publish.cite(made, bibliography)
    made.cells = [spoken(cell) for cell in made.cells] + [code(REPORT, "report")]
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    return made


def numbers(cells: NotebookNode, source: notebook.Source, bibliography: Path) -> dict[str, str]:
    """What each label is called, found with something in place of every figure and table."""
    for cell in cells.cells:
        label = cell.metadata.get("options", {}).get("label", "")
        data = FIGURE if label.startswith("fig-") else TABLE
        count = len(cell.metadata.options.get("fig-subcap", [0])) if label else 0
        if label.startswith(("fig-", "tbl-")):
            cell.outputs = [nbformat.v4.new_output("display_data", data)] * count
    with tempfile.TemporaryDirectory() as folder:
        names = document.compose(cells, source, bibliography, Path(folder))[1]
    for cell in cells.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return names


def installation() -> str:
    """The cell that installs, with the versions that the project itself has."""
    makefile, lock = ((PROJECT / name).read_text() for name in ("Makefile", "requirements.lock"))
    line = next(x for x in makefile.splitlines() if "--no-deps" in x)
    packages = [word for word in line.split() if "==" in word]
    version = next(x for x in lock.splitlines() if x.startswith("jax==")).removeprefix("jax==")
    return INSTALL.replace("PACKAGES", " ".join(packages)).replace("VERSION", version)


def code(text: str, tag: str) -> NotebookNode:
    return nbformat.v4.new_code_cell(text, metadata={"cellView": "form", "tags": [tag]})


def spoken(cell: NotebookNode) -> NotebookNode:
    """A text with inline expressions as code that shows it with their values."""
    text = cell.source
    if cell.cell_type != "markdown" or not notebook.INLINE.search(text):
        return cell
    literal = f'r"""\n{text}\n"""' if '"""' not in text else repr(text)
    opening = "#@title Text\nfrom rlhf_report.quarto.colab import say\n\n"
    return code(f"{opening}say({literal}, globals())", "text")


def say(text: str, names: Mapping[str, Any]) -> None:
    """Displays Markdown in which every inline expression is replaced by its value."""

    def value(match) -> str:
        found = eval(match[1].strip(), dict(names))
        return found.data if isinstance(found, Markdown) else str(found)

    display(Markdown(notebook.INLINE.sub(value, text)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_report.quarto.colab", description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "_output" / "colab.ipynb")
    options = parser.parse_args(arguments)

    def work() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(colab(PROJECT / "report.qmd"), options.output)
        print(f"wrote {options.output}")

    return concluded(work)


if __name__ == "__main__":
    raise SystemExit(main())
