"""What an accelerator computes in, and that one which lies idle is told."""

import os
import stat

import pytest

from experiment_runs import accelerator, precision


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [
        ("gpu", "6.0", False),  # P100
        ("gpu", "7.0", False),  # V100
        ("gpu", "7.5", False),  # T4, which Colab lends
        ("gpu", "8.0", True),  # A100
        ("gpu", "8.9", True),  # L4
        ("gpu", "10.0", True),  # B200
        ("gpu", "gfx90a", True),  # AMD MI250
        ("tpu", "", True),
        ("cpu", "", False),
    ],
)
def test_bfloat16_is_for_cards_that_multiply_it(platform, capability, has):
    assert accelerator.has_bfloat16(platform, capability) is has


def test_a_processor_is_no_accelerator():
    assert not accelerator.multiplies_bfloat16()


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_an_accelerator_computes_in_what_it_multiplies_unless_told(has, expected, monkeypatch):
    monkeypatch.delenv("RLHF_PRECISION", raising=False)
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: has)
    assert precision.resolved() == expected
    assert precision.resolved("bfloat16") == "bfloat16"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi which prints a line, or fails, before all others."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(accelerator, "DEVICE", tmp_path / "nvidia0")

    def make(line):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{line}'\n" if line else "#!/bin/sh\nexit 9\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.mark.parametrize(
    ("line", "command"),
    [("Tesla T4, 550.54.15", "GPU=cuda12`"), ("NVIDIA H100, 580.65.06", "GPU=cuda13`")],
)
def test_a_card_that_jax_does_not_use_is_named_with_the_command_for_its_driver(
    line, command, machine
):
    machine(line)
    told = accelerator.idle_gpu()
    assert line.partition(",")[0] in told and command in told and "on the CPU" in told


def test_a_card_whose_tool_fails_is_told_by_its_device_file(machine, tmp_path):
    machine(None)
    assert accelerator.idle_gpu() is None
    (tmp_path / "nvidia0").touch()
    assert "has an NVIDIA card" in accelerator.idle_gpu()


def test_who_asks_for_the_cpu_is_told_nothing(machine, monkeypatch):
    machine("Tesla T4, 550.54.15")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert accelerator.idle_gpu() is None
