"""Who may import whom: packages and folders stand on each other, and no import runs upwards."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # and what of this project each stands on
    "experiment_runs": set(),
    "rlhf_jax": {"experiment_runs"},
    "gan_jax": {"experiment_runs"},
    "rlhf_report": {"experiment_runs", "rlhf_jax", "gan_jax"},
}
FLOOR = ("config", "objectives", "intervals", "profiles")
FOLDERS = (
    "data", "language_model", "pretrained", "optimization", "reward_model", "ppo",
    "baselines", "evaluation",
    "ratings", "export",
)  # fmt: skip
ROOF = ("memory", "trained", "chat", "run_commands", "experiment", "api", "__main__")
LONGEST = 350  # lines of a module


def files(package):
    """Every module of a package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


MODULES = {name: path for package in PACKAGES for name, path in files(package).items()}


def imported(path):
    """The modules of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def place(module):
    """The folder or module of `rlhf_jax` that a dotted name belongs to."""
    return module.removeprefix("rlhf_jax").lstrip(".").partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_that_it_stands_on(package):
    for name, path in files(package).items():
        foreign = {module.partition(".")[0] for module in imported(path)} - {package}
        assert foreign <= PACKAGES[package], f"{name} imports {sorted(foreign)}"


def test_every_folder_and_module_of_rlhf_jax_has_its_place():
    places = {place(name) for name in files("rlhf_jax")} - {""}
    assert places == {*FLOOR, *FOLDERS, *ROOF}


@pytest.mark.parametrize("folder", (*FLOOR, *FOLDERS, *ROOF))
def test_nothing_imports_from_a_folder_above_it(folder):
    order = (*FLOOR, *FOLDERS, *ROOF)
    below = {"", *order[: order.index(folder) + 1]}
    for name, path in files("rlhf_jax").items():
        if place(name) == folder:
            own = {module for module in imported(path) if module.startswith("rlhf_jax.")}
            above = {module for module in own if place(module) not in below}
            assert not above, f"{name} imports {sorted(above)}"


def test_no_module_imports_itself_through_others():
    order = graphlib.TopologicalSorter({name: imported(path) for name, path in MODULES.items()})
    assert set(MODULES) == set(order.static_order())


def test_no_module_is_longer_than_a_sitting():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: count for name, count in lengths.items() if count > LONGEST}
