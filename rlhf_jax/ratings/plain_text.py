"""Texts that a model wrote, shown in a terminal: they must not steer it."""

import shutil
import textwrap
import unicodedata


def block(text: str) -> str:
    """The text indented and wrapped to the terminal's width; an empty one says so."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines = []
    for line in printable(text).split("\n"):
        wrapped = textwrap.wrap(
            line, width, initial_indent="  ", subsequent_indent="  ", drop_whitespace=False
        )
        lines += wrapped or [""]
    return "\n".join(lines) if text.strip() else "  (empty)"


def printable(text: str) -> str:
    """The text with the number of each invisible character in its place.

    Among them are those that colour, erase or reorder what stands around them.
    """
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c).startswith("C") and c not in "\n\t" else c
        for c in text.replace("\r\n", "\n")
    )


def read_until(read: str) -> str:
    """The sentence about a question of which the models read the beginning only.

    Args:
      read: the part that they read; "" where it is the whole question.
    """
    end = " ".join(read.split())[-60:]
    return f"The models read only the beginning of this question, up to “{end}”." if read else ""
