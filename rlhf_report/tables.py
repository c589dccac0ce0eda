"""Text and tables for the report, as Markdown that Quarto and the built-in renderer read alike."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from rlhf_report.quarto.cells import visible

WIDEST = 60  # dashes under a column: Quarto shares the page's width in their proportion


def quote(text: str) -> str:
    """Markdown that shows arbitrary text, whatever it contains, as a block quotation.

    Paragraphs, line breaks and indentation are kept; control characters become visible.
    """
    text = re.sub(r"\r\n?", "\n", text)
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


def table(frame: pd.DataFrame, *, digits: int = 3) -> Markdown:
    """A data frame as a pipe table: numbers on the right with `digits` decimals, text escaped.

    A missing value is a dash; a `Markdown` object in the frame stays Markdown.
    """
    columns = [
        [escape(str(name)), *(show(value, digits) for value in frame.iloc[:, k])]
        for k, name in enumerate(frame.columns)
    ]
    rules = []
    for k, cells in enumerate(columns):
        number = pd.api.types.is_numeric_dtype(frame.dtypes.iloc[k])
        dashes = "-" * min(WIDEST, max(3, *map(len, cells)))
        rules.append(dashes[1:] + ":" if number else ":" + dashes[1:])
    rows = [*zip(*columns, strict=True)]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]]))


def first_steps(metrics: pd.DataFrame, columns: Sequence[str], count: int = 8) -> pd.DataFrame:
    """The beginning of a training log."""
    return metrics[[name for name in columns if name in metrics]].head(count)


def source(function: Any) -> Markdown:
    """The code of a function as it runs, decorators included."""
    return Markdown(f"```python\n{inspect.getsource(inspect.unwrap(function)).rstrip()}\n```")


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
