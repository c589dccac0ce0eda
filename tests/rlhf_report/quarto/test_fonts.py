"""Characters beyond ASCII: in the text, in the path, and where no font has them."""

import functools

import pytest

from rlhf_report.quarto import fonts, render


@pytest.fixture(autouse=True)
def only_fonts_of_packages(monkeypatch):
    carried = functools.partial(fonts.typst.Fonts, include_system_fonts=False)
    monkeypatch.setattr(fonts.typst, "Fonts", carried)


def test_what_a_font_has_is_shown_and_what_none_has_is_not():
    assert fonts.boxes("naïve → 😀 ❤") == []  # in the fonts that matplotlib carries
    assert fonts.boxes("ab 漢字 a") == ["字", "漢"]


def test_a_document_in_any_folder_and_locale_is_set_and_its_boxes_are_told(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("LC_ALL", "C")
    folder = tmp_path / "100% of it ü漢"
    folder.mkdir()
    (folder / "_quarto.yml").write_text("bibliography: references.bib\n")
    (folder / "references.bib").write_text("@misc{a, title = {漢}, year = 2000}\n", "utf-8")
    (folder / "a.qmd").write_text("---\ntitle: A\n---\n\nSee [@a] 漢.\n", "utf-8")
    page, paper = render.render(folder / "a.qmd", ["html", "typst"])
    assert "<em>漢</em>" in page.read_text("utf-8") and paper.stat().st_size > 1000
    assert "boxes in place of 漢, " in capsys.readouterr().err
