"""The two files that are handed in: `make submission LAST_NAME=Lovelace STUDENT_ID=123456`.

The report as PDF, and the executed notebook that it was made from. The last digit of the student
ID chooses the images of the DCGAN.
"""

import argparse
import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import nbformat

from experiment_runs.errors import UserError
from experiment_runs.settings import PROJECT
from gan_jax.data import dataset_for
from rlhf_jax.experiment import from_environment
from rlhf_report.quarto.notebook import CellError
from rlhf_report.quarto.render import render

EXAMPLE = "make submission LAST_NAME=Lovelace STUDENT_ID=123456"
PUNCTUATION = " .'’-"  # in names of people, and harmless in names of files
LONGEST = 200  # bytes of a name; a file's name holds 255
SETTINGS = ("RLHF_PROFILE", "RLHF_MODEL", "RLHF_DATA_DIR", "RLHF_STUDENT_ID", "RLHF_RUN")


def asked() -> str:
    """The last name that the environment gives, as part of a file's name.

    Raises:
      UserError: it or the student ID is missing, or is not what it should be.
    """
    values = {name: os.environ.get(f"RLHF_{name}", "") for name in ("LAST_NAME", "STUDENT_ID")}
    if missing := [name for name, value in values.items() if not value.strip()]:
        raise UserError(f"{' and '.join(missing)} missing: {EXAMPLE}")
    dataset_for(values["STUDENT_ID"])
    return file_name(values["LAST_NAME"])


def file_name(last_name: str) -> str:
    """A last name as part of a file's name: letters of any script, "_" in place of a space.

    Raises:
      UserError: it holds what no name holds, as a path would, or is too long.
    """
    name = unicodedata.normalize("NFC", " ".join(last_name.split()))
    letters = all(unicodedata.category(x)[0] in "LM" or x in PUNCTUATION for x in name)
    if not (letters and name[:1].isalpha() and len(name.encode()) <= LONGEST):
        raise UserError(
            f"LAST_NAME={last_name!r}: write at most {LONGEST} bytes of letters, spaces, hyphens, "
            "apostrophes and full stops, a letter first"
        )
    return name.replace(" ", "_")


def write(name: str, document: Path) -> list[Path]:
    """Renders a document and writes the files to be handed in beside the outputs."""
    paper, cells = render(document, ["pdf", "ipynb"])
    handed_in = [
        paper.with_name(f"{name}_HW2.pdf"),
        cells.with_name(f"{name}_HW2_source_code.ipynb"),
    ]
    shutil.copyfile(paper, handed_in[0])
    notebook = nbformat.read(cells, as_version=4)
    notebook.cells.insert(1, settings_cell())
    nbformat.write(notebook, handed_in[1])
    return handed_in


def settings_cell() -> nbformat.NotebookNode:
    """What the environment asked for, as code: executed again, the notebook shows the same runs."""
    values = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    lines = [f"    {name}={value!r}," for name, value in values.items()]
    code = "\n".join([
        "import os", "", "from experiment_runs.settings import PROJECT", "",
        "os.chdir(PROJECT)  # wherever this notebook lies",
        "os.environ.update(", *lines, ")",
    ])  # fmt: skip
    return nbformat.v4.new_code_cell(code, id="settings", execution_count=0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_report.submission", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check the name and the number")
    options = parser.parse_args(arguments)
    try:
        name = asked()
        if not options.check:
            os.environ["RLHF_PROFILE"] = from_environment().profile.name
            for path in write(name, PROJECT / "report.qmd"):
                print(f"wrote {path}")
    except (UserError, CellError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CellError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
