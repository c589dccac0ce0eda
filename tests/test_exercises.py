"""The exercises of assignment.toml: each break turns the test red that it names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiment_runs.assignment import ASSIGNMENT

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("experiment_runs", "rlhf_jax", "gan_jax", "rlhf_report", "tests")
EXERCISES = pytest.mark.parametrize(
    "exercise", ASSIGNMENT["exercise"], ids=lambda own: own["test"].split("::")[1]
)


@EXERCISES
def test_what_an_exercise_breaks_stands_there_once_and_its_test_exists(exercise):
    text = (ROOT / exercise["file"]).read_text()
    assert text.count(exercise["before"]) == 1
    file, name = exercise["test"].split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.exhaustive
@EXERCISES
def test_the_break_turns_the_named_test_red(exercise, tmp_path):
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "assignment.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pytest", "-rf", exercise["test"]]
    results = []
    text = (ROOT / exercise["file"]).read_text()
    for code in (text, text.replace(exercise["before"], exercise["after"])):
        (tmp_path / exercise["file"]).write_text(code)
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        results.append((done.returncode, done.stdout))
    assert [code for code, _ in results] == [0, 1], results
    assert f"FAILED {exercise['test']}" in results[1][1]
