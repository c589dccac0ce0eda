"""Who may import whom: inside a package only what stands above, across packages almost nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = {
    "rlhf_jax": (
        "source", "standin", "data", "split", "attention", "model", "config", "tokenizer",
        "pretrained", "objectives", "batch", "packing", "statistics", "training", "generation",
        "judge", "baseline", "evidence", "examination", "reward", "policy", "rollout", "ppo",
        "comparison", "evaluation", "terminal", "ratings", "agreement", "questionnaire", "chat",
        "model_card", "export", "pipeline", "__main__",
    ),
    "gan_jax": (
        "config", "data", "augmentation", "convolution", "dcgan", "training", "features",
        "detectors", "calibration", "evaluation", "export", "model_card", "experiment", "__main__",
    ),
    "reporting": (
        "runs", "tables", "summaries", "figures", "gan_figures", "gan_summaries", "responses",
        "evidence", "notebook", "cells", "document", "render", "submission",
    ),
}  # fmt: skip
LIBRARIES = ("rlhf_jax", "gan_jax")


def imported(path):
    """(package, module) of everything that a file imports from this project."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            modules = [module] if module else [alias.name for alias in node.names]
            found |= {(package, name.partition(".")[0]) for name in modules}
        elif isinstance(node, ast.Import):
            found |= {tuple((alias.name + ".").split(".")[:2]) for alias in node.names}
    return {(package, module) for package, module in found if package in ORDER}


def files(package):
    return {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}


@pytest.mark.parametrize("package", ORDER)
def test_a_module_imports_only_modules_above_it(package):
    order = ORDER[package]
    for name, path in files(package).items():
        assert name in order, f"{package}/{name}.py has no place in the order of {__file__}"
        own = {module for other, module in imported(path) if other == package}
        below = own - set(order[: order.index(name)])
        assert not below, f"{package}/{name}.py imports {sorted(below)}"


@pytest.mark.parametrize("package", LIBRARIES)
def test_a_library_imports_runs_from_reporting_and_nothing_from_the_other_library(package):
    for path in (ROOT / package).glob("*.py"):
        foreign = {pair for pair in imported(path) if pair[0] != package}
        assert foreign <= {("reporting", "runs")}, f"{path.name} imports {sorted(foreign)}"


def test_what_the_libraries_import_from_reporting_imports_nothing_of_this_project():
    assert not imported(ROOT / "reporting" / "runs.py")
