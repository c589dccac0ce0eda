"""The files that describe the environment say the same."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def test_conda_users_get_the_packages_and_versions_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert sorted(pip) == sorted(required("dependencies", "report"))


def required(*groups):
    """The requirements of groups, with those of the project's own extras that they name."""
    found = []
    for group in groups:
        for text in PROJECT.get(group) or PROJECT["optional-dependencies"][group]:
            requirement = Requirement(text)
            own = requirement.name == PROJECT["name"]
            found += required(*requirement.extras) if own else [text]
    return found


@pytest.mark.parametrize("group", ["dependencies", "report", "dev"])
def test_the_lock_pins_every_direct_dependency_within_its_range(group):
    wanted = required(group)
    pins = [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]
    pinned = {pin.name.lower().replace("_", "-"): str(pin.specifier) for pin in pins}
    for requirement in map(Requirement, wanted):
        pin = pinned[requirement.name.lower().replace("_", "-")]
        assert re.fullmatch(r"==[^,*]+", pin), f"{requirement.name} is not pinned exactly"
        assert requirement.specifier.contains(pin.removeprefix("==")), requirement


def test_every_direct_dependency_says_from_which_version_on():
    """Without a bound, the lowest version that is allowed is one of twenty years ago."""
    for requirement in map(Requirement, required("dependencies", "report", "dev")):
        assert re.search(">=|==", str(requirement.specifier)), requirement


def test_the_lock_brings_neither_pytorch_nor_cuda_nor_addresses():
    assert not re.search(r"^(torch|nvidia|jax-cuda|triton)", LOCK, re.MULTILINE)
    assert "://" not in LOCK and "--" not in LOCK


def test_every_package_that_is_imported_is_required_where_it_is_needed():
    """Training needs no more than `rlhf_jax` alone installs; the chapters bring their own."""
    named = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image",
             "IPython": "ipython", "yaml": "pyyaml", "pypandoc": "pypandoc-binary",
             "orbax": "orbax-checkpoint", "pyarrow": "datasets",
             "jupyter_core": "jupyter-client", "fontTools": "fonttools"}  # fmt: skip
    groups = {
        "experiment_runs": ["dependencies"], "rlhf_jax": ["dependencies"],
        "gan_jax": ["dependencies", "gan"], "rlhf_report": ["dependencies", "report"],
    }  # fmt: skip
    optional = {"tensorboardX", "trackio"}  # asked for by a setting, with a message of their own
    for package, needed in groups.items():
        there = {Requirement(text).name.lower().replace("_", "-") for text in required(*needed)}
        for path in (ROOT / package).rglob("*.py"):
            for module in imported(path) - optional - set(sys.stdlib_module_names) - set(groups):
                assert named.get(module, module).lower().replace("_", "-") in there, (path, module)


def imported(path):
    """The packages that a module imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_gpu_gets_its_own_jax_of_the_locked_version_before_anything_is_trained():
    def plan(gpu):
        command = ["make", "--dry-run", "--always-make", "report", f"GPU={gpu}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    (version,) = re.findall(r"^jax==(.*)$", LOCK, re.MULTILINE)
    for gpu in ("cuda12", "cuda13"):
        steps = plan(gpu).stdout
        assert f'"jax[{gpu}]=={version}"' in steps.split("gan_jax train")[0]
    assert "jax[" not in plan("").stdout
    refused = plan("cuda11")
    assert refused.returncode == 2 and "choose cuda12 or cuda13" in refused.stderr
