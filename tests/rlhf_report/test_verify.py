"""A submission that is not what it should be is named with what is wrong."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiment_runs.settings import PROJECT
from rlhf_report import submission, verify

FIXTURE = Path(__file__).parent / "quarto" / "fixture"
TABLES = "".join(f"{title} its responses.\n\n" for title in verify.RATING_TABLES)


@pytest.fixture
def hand_in(tmp_path, monkeypatch):
    """A function that hands in a small report of a run, in a folder of its own."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)
    monkeypatch.setenv("RLHF_STUDENT_ID", "123457")

    def write(name="Lovelace", identity="0123abcd", text=TABLES, profile="assignment"):
        monkeypatch.setenv("RLHF_PROFILE", profile)
        folder = tmp_path / f"{name}-{identity}-{profile}-{len(text)}"
        shutil.copytree(FIXTURE, folder)
        (folder / "report.qmd").write_text(f"---\ntitle: Handed in\n---\n\n{text}")
        runs = {"evaluate": SimpleNamespace(identity=identity)}
        paper, *_ = submission.write(name, folder / "report.qmd", runs)
        return paper.parent

    return write


def found(folder):
    (row,) = verify.results_table([folder]).to_dict("records")
    return row["problems"]


def test_a_submission_in_order_has_no_problems_and_broken_copies_have_theirs(hand_in, capsys):
    good, other = hand_in(), hand_in(identity="ffff0000")
    assert found(good) == "none"
    assert "profile assignment" in found(hand_in(profile="cpu"))
    assert "no table 'PPO with LoRA:'" in found(hand_in(text=TABLES.replace("LoRA", "x")))
    assert verify.main([str(good), str(good / "Lovelace_HW2.pdf")]) == 0
    assert "none" in capsys.readouterr().out
    shutil.copyfile(other / "Lovelace_HW2.pdf", good / "Lovelace_HW2.pdf")
    assert found(good) == "PDF and notebook show different runs"
    for file in list(other.iterdir()):
        file.rename(file.with_name(file.name.replace("Lovelace", "Babbage")))
    assert "does not name Babbage" in found(other)
    (other / "Babbage_HW2_source_code.ipynb").unlink()
    assert "no _HW2_source_code.ipynb" in found(other)


def test_a_file_that_is_no_submission_is_told(tmp_path, capsys):
    for wrong in ([], [str(tmp_path)], [str(tmp_path / "lost")]):
        assert verify.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for ending in verify.ENDINGS:
        (tmp_path / f"A{ending}").write_text("no such thing")
    assert "cannot be read" in found(tmp_path)
