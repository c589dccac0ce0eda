"""Text and tables for the report, as Markdown that Quarto and the built-in renderer read alike."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from rlhf_report.quarto.cells import visible

BOLD = 1.15  # how much wider letters of a column's name may be than others
PARTS = re.compile("[\\s\u00ad]+")  # between what stands together on a line
LINE = 120  # characters of a table that stand side by side on a page


def quote(text: str, *, head: str = "") -> str:
    """Markdown that shows arbitrary text, whatever it contains, as a block quotation.

    Paragraphs, line breaks and indentation are kept; control characters become visible. A `head` is
    Markdown that says whose text it is, in the first paragraph, so that no page ends between them.
    """
    text = re.sub(r"\r\n?", "\n", text)
    if head:
        return f"> {head}\\\n{quote(text)}"
    if not text.strip(" \t\n"):
        return "> *(only white space)*" if text else "> *(empty)*"
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", re.sub(r"^(?:[ \t]*\n)+|[ \t\n]+$", "", text))
    quoted = ("\\\n> ".join(map(escape, paragraph.split("\n"))) for paragraph in paragraphs)
    return "\n>\n".join(f"> {paragraph}" for paragraph in quoted)


def escape(text: str) -> str:
    """Markdown that shows arbitrary text within a line or a table cell; a line end becomes ¶."""
    text = visible(re.sub(r"\r\n?|\n", " ¶ ", text).expandtabs(4).rstrip(" "))
    text = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)
    return re.sub(r"^ ", "\u00a0", text.replace("  ", "\u00a0 "))


def text(value: str) -> Markdown:
    """Arbitrary text for an inline expression, whatever it contains."""
    return Markdown(escape(value))


def table(
    frame: pd.DataFrame, *, digits: int = 3, empty: str = "There is nothing to show."
) -> Markdown:
    """A data frame as a pipe table: numbers on the right with `digits` decimals, text escaped.

    A missing value is a dash; a `Markdown` object in the frame stays Markdown. In place of a table
    without rows stands the sentence `empty`.
    """
    if frame.empty:
        return text(empty)
    columns = [
        [escape(str(name)), *(show(value, digits) for value in frame.iloc[:, k])]
        for k, name in enumerate(frame.columns)
    ]
    rules = []
    for k, width in enumerate(column_widths(columns)):
        number = pd.api.types.is_numeric_dtype(frame.dtypes.iloc[k])
        rules.append("-" * (width - 1) + ":" if number else ":" + "-" * (width - 1))
    rows = [*zip(*columns, strict=True)]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]]))


def column_widths(columns: Sequence[Sequence[str]]) -> list[int]:
    """Characters for each column, which share the page in their proportion, as dashes say it.

    Each gets what its longest cell needs; where that is more than a line, its longest word, or part
    of one at a soft hyphen, which may stand in its bold name, and of what is left the more, the
    longer its cells are.
    """
    shown = [[re.sub(r"\\(.)", r"\1", cell) for cell in cells] for cells in columns]
    wanted = [max(3, *map(len, cells)) for cells in shown]
    if sum(wanted) <= LINE:
        return wanted
    longest = [max(len(x) for cell in cells for x in PARTS.split(cell)) for cells in shown]
    names = [max(map(len, PARTS.split(cells[0]))) for cells in shown]
    least = [
        max(3, 2 + min(length, 20), 2 + math.ceil(BOLD * name))
        for length, name in zip(longest, names, strict=True)
    ]
    missing = [math.sqrt(max(0, w - x)) for w, x in zip(wanted, least, strict=True)]
    share = max(0, LINE - sum(least)) / (sum(missing) or 1)
    return [x + round(share * m) for x, m in zip(least, missing, strict=True)]


def first_steps(metrics: pd.DataFrame, columns: Sequence[str], count: int = 8) -> pd.DataFrame:
    """The beginning of a training log."""
    return metrics[[name for name in columns if name in metrics]].head(count)


def confusion(found: Mapping[str, Any]) -> pd.DataFrame:
    """The confusion matrix of a classifier, as a summary holds it; rows are the truth."""
    kinds = [row["class"] for row in found["report"]]
    return pd.DataFrame(
        {"truth": kind, **{f"said: {name}": n for name, n in zip(kinds, row, strict=True)}}
        for kind, row in zip(kinds, found["confusion"], strict=True)
    )


def classification(found: Mapping[str, Any]) -> pd.DataFrame:
    """The classification report beside it."""
    return pd.DataFrame(found["report"])


def source(function: Any) -> Markdown:
    """The code of a function as it runs, decorators included; a docstring's references to this
    report's equations, which stand beside it, are left out."""
    code = inspect.getsource(inspect.unwrap(function)).rstrip()
    code = re.sub(r" *\(@eq-[\w-]+\)|[;,]? *@eq-[\w-]+", "", code)
    return Markdown(f"```python\n{code}\n```")


def show(value: Any, digits: int) -> str:
    """One cell of a table."""
    if isinstance(value, Markdown):
        return value.data
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        ordinary = value == 0 or 10**-digits <= abs(value) < 1e6
        return f"{value:.{digits}f}" if ordinary else f"{value:.{digits}g}"
    return escape(str(value))
