"""Which characters the fonts at hand can show in the PDF."""

from pathlib import Path

import matplotlib
import typst
from fontTools.ttLib import TTFont

FOLDER = Path(matplotlib.get_data_path(), "fonts", "ttf")
LAST_RESORT = "Last Resort"  # has every character, as the same box for a whole script


def boxes(text: str) -> list[str]:
    """The characters of a text that no font has, so that the PDF shows boxes in their place."""
    missing = {x for x in text if ord(x) > 0x7F and x.isprintable()}
    for font in typst.Fonts(font_paths=[FOLDER]).fonts():
        if not missing:
            break
        if font.path and LAST_RESORT not in font.family:
            with TTFont(font.path, fontNumber=font.index, lazy=True) as file:
                missing -= {chr(code) for code in file.getBestCmap() or ()}
    return sorted(missing)
