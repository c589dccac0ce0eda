"""What an installation brings: the wheel, unpacked in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# What the README's lines take as given.
GIVEN = """
prompts = [f"Say {i}." for i in range(64)]
pairs = [{"prompt": p, "chosen": f"Yes: {p}", "rejected": f"No, not {p}"} for p in prompts]
"""
ONE_BY_ONE = """
import runpy, sys
for number, script in enumerate(sys.argv[1:]):
    print(end="\\0" if number else "")
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")
"""
LONG = "gentler_settings.py", "known_optimum.py"  # examples of many trainings
SHORT = sorted({path.name for path in EXAMPLES.glob("*.py")} - {*LONG})
PACKAGES = ("experiment_runs", "rlhf_jax", "gan_jax", "rlhf_report")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, which the build may litter."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
         "--disable-pip-version-check", "--no-index", "--wheel-dir", out, source],
        check=True, timeout=120,
    )  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_every_data_file_and_the_mark_of_types(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{name}/py.typed" for name in PACKAGES} <= wanted
    assert wanted - held == set()
    assert {name for name in held if ".dist-info/" not in name} - wanted == set()


@pytest.fixture
def python(wheel, tmp_path):
    """Python that has the wheel, in an empty folder: a function from arguments to its output."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "RLHF_RESULTS": ""}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path / "work", env=environment, timeout=500,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    return run


def test_an_installed_package_runs_anywhere_and_keeps_its_results_there(python, tmp_path):
    assert "usage: python -m rlhf_jax" in python("-m", "rlhf_jax", "--help")
    code = "import rlhf_jax; from experiment_runs import settings; print(settings.LOCAL)"
    assert python("-c", f"{code}; print(rlhf_jax.__file__)").splitlines() == [
        str(tmp_path / "work" / "results" / "local"),
        str(tmp_path / "site" / "rlhf_jax" / "__init__.py"),
    ]


@pytest.mark.slow
def test_what_the_readme_shows_runs_from_an_installation_in_an_empty_folder(python, tmp_path):
    text = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(import rlhf_jax\n.*?)```", text, re.S)
    code = shown.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"random"')
    assert code != shown
    (tmp_path / "readme.py").write_text(GIVEN + code)
    check(python, tmp_path, [tmp_path / "readme.py"])


@pytest.mark.parametrize(
    "names",
    [pytest.param(SHORT, marks=pytest.mark.slow)]
    + [pytest.param([name], marks=pytest.mark.exhaustive) for name in LONG],
    ids=lambda names: ",".join(names),
)
def test_the_examples_run_from_an_installation_in_an_empty_folder(python, tmp_path, names):
    check(python, tmp_path, [EXAMPLES / name for name in names])


def check(python, tmp_path, scripts):
    """Runs scripts one after another in one process; each prints what it found and keeps runs."""
    folder = tmp_path / "work"
    for script, said in zip(scripts, python("-c", ONE_BY_ONE, *scripts).split("\0"), strict=True):
        assert len(said.strip()) > 10, script
    assert {path.name for path in folder.iterdir()} <= {"results", "tuned-model"}
    assert len([*folder.glob("results/*/*/summary.json")]) >= len(scripts)
