"""The files that describe the environment say the same."""

import re
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
    assert sorted(pip) == sorted(PROJECT["dependencies"])


@pytest.mark.parametrize("group", ["dependencies", "dev"])
def test_the_lock_pins_every_direct_dependency_within_its_range(group):
    wanted = PROJECT.get(group) or PROJECT["optional-dependencies"][group]
    pins = [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]
    pinned = {pin.name.lower().replace("_", "-"): str(pin.specifier) for pin in pins}
    for requirement in map(Requirement, wanted):
        pin = pinned[requirement.name.lower().replace("_", "-")]
        assert re.fullmatch(r"==[^,*]+", pin), f"{requirement.name} is not pinned exactly"
        assert requirement.specifier.contains(pin.removeprefix("==")), requirement


def test_the_lock_brings_neither_pytorch_nor_cuda_nor_addresses():
    assert not re.search(r"^(torch|nvidia|jax-cuda|triton)", LOCK, re.MULTILINE)
    assert "://" not in LOCK and "--" not in LOCK
