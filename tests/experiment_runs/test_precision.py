import dataclasses

import jax
import pytest

from experiment_runs import precision
from experiment_runs import run as runs
from experiment_runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1


@pytest.mark.parametrize(
    ("asked", "named", "flag", "taken"),
    [
        ("auto", "", "avx512_bf16", "mixed"),
        ("auto", "", None, "float32"),
        ("auto", "float32", "amx_bf16", "float32"),
        ("auto", "mixed", None, "mixed"),
        ("float32", "mixed", "avx512_bf16", "float32"),
    ],
)
def test_what_is_asked_for_is_taken_and_else_what_the_processor_is_fast_in(
    monkeypatch, asked, named, flag, taken
):
    monkeypatch.setenv("RLHF_PRECISION", named)
    monkeypatch.setenv("RLHF_MESH", "data=1")
    monkeypatch.setattr(precision, "fast_flag", lambda: flag)
    assert precision.resolved(asked) == taken
    told = precision.told(taken)
    assert told.startswith(taken) and (flag is None or flag in told)


def test_an_accelerator_computes_activations_in_bfloat16_too(monkeypatch):
    monkeypatch.setenv("RLHF_PRECISION", "")
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert precision.resolved() == precision.told("bfloat16") == "bfloat16"


def test_what_is_said_of_mixed_products_is_true_of_the_device(monkeypatch):
    monkeypatch.setattr(precision, "fast_flag", lambda: None)
    monkeypatch.setenv("RLHF_MESH", "data=2")
    assert "multiplied in float32" in precision.told("mixed")
    assert precision.told("float32") == "float32"
    monkeypatch.setenv("RLHF_MESH", "data=1")
    assert "slow without" in precision.told("mixed")
    assert "for accelerators" in precision.told("bfloat16")
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "gpu")
    assert "slow" not in precision.told("mixed")


def test_a_precision_that_there_is_not_is_named_with_those_there_are(monkeypatch):
    monkeypatch.setenv("RLHF_PRECISION", "float16")
    with pytest.raises(UserError, match="RLHF_PRECISION=float16: .*float32, mixed, bfloat16"):
        precision.resolved()
    with pytest.raises(UserError, match="^precision=bf16: unknown; .*float32, mixed, bfloat16"):
        precision.resolved("bf16")


def test_64_bits_are_refused_before_anything_is_trained_and_may_be_off_for_a_while(tmp_path):
    def ensure(train):
        return runs.ensure("stage", Config(), train, inputs={}, root=tmp_path)

    with jax.enable_x64(True):
        with pytest.raises(UserError, match="JAX_ENABLE_X64 is on"):
            ensure(lambda run: pytest.fail("was trained"))
        with jax.enable_x64(False):
            assert ensure(lambda run: run.finish()).finished


def test_a_run_says_how_its_float32_products_were_computed(tmp_path):
    for name in ("highest", None):
        with jax.default_matmul_precision(name):
            assert precision.matmul_precision() == (name or "default")
            root = tmp_path / str(name)
            run = runs.ensure("stage", Config(), lambda run: run.finish(), inputs={}, root=root)
        assert run.record["matmul_precision"] == (name or "default")
