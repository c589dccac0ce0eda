"""Checks submissions: `python -m rlhf_report verify FILE_OR_FOLDER...`, one row for each student.

What is checked: the files' names; that PDF, notebook and page carry the identities of the same
runs; that the student on the first page is the one in the file's name; that the three tables of
ratings are there; and the profile. It reads text and metadata and runs nothing of what is given.
"""

import collections
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pandas as pd
import pypdf

from experiment_runs.command import concluded
from experiment_runs.errors import UserError
from rlhf_report.submission import ENDINGS, PROTOCOL

RATING_TABLES = ("The original model:", "The model tuned by PPO, every weight:", "PPO with LoRA:")


def submissions(paths: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The files of each submission, by the student's name and by ending.

    Raises:
      UserError: a path does not exist, or holds nothing that is named as a submission is.
    """
    found: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: does not exist; name the file or folder of a submission")
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        own = [(x, e) for x in files for e in ENDINGS if x.is_file() and x.name.endswith(e)]
        if not own:
            raise UserError(f"{path}: no file ends in {', '.join(ENDINGS)}")
        for file, ending in own:
            found[str(file.parent / file.name.removesuffix(ending))][ending] = file
    return dict(found)


def problems(files: dict[str, Path]) -> list[str]:
    """What is wrong with one submission; nothing where all is as it should be."""
    found = [f"no {ending} beside the others" for ending in ENDINGS[:2] if ending not in files]
    if found:
        return found
    paper, cells = (files[ending] for ending in ENDINGS[:2])
    try:
        reader = pypdf.PdfReader(paper)
        pages = [re.sub(r"\s+", " ", page.extract_text()) for page in reader.pages]
        keywords = [x.strip() for x in (reader.metadata.get("/Keywords") or "").split(",")]
    except (pypdf.errors.PyPdfError, OSError, ValueError) as error:
        return [f"{paper.name} cannot be read: {error}"]
    try:
        notebook = nbformat.read(cells, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, OSError, ValueError) as error:
        return [f"{cells.name} cannot be read: {error}"]
    if keywords != list(notebook.metadata.get("keywords", [])):
        found.append("PDF and notebook show different runs")
    name = paper.name.removesuffix(ENDINGS[0]).replace("_", " ")
    if not re.search(rf"{re.escape(name)}, student ID \d+", pages[0]):
        found.append(f"the first page does not name {name} with a student ID")
    text = " ".join(pages)
    found += [f"no table '{title}'" for title in RATING_TABLES if title not in text]
    if f"profile={PROTOCOL}" not in keywords:
        found.append(f"not made with the profile {PROTOCOL}")
    return found


def results_table(paths: Sequence[Path]) -> pd.DataFrame:
    """One row a submission: whose it is, and what is wrong."""
    rows = [
        {"submission": name, "problems": "; ".join(problems(files)) or "none"}
        for name, files in submissions(paths).items()
    ]
    return pd.DataFrame(rows)


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        if not arguments:
            raise UserError("name a file or folder: python -m rlhf_report verify FILE_OR_FOLDER...")
        print(results_table([Path(x) for x in arguments]).to_string(index=False))

    return concluded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
