import pytest

from experiment_runs import precision
from experiment_runs.errors import UserError


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
    monkeypatch.setattr(precision, "fast_flag", lambda: flag)
    assert precision.resolved(asked) == taken
    told = precision.told(taken)
    assert told.startswith(taken) and (flag is None or flag in told)


def test_an_accelerator_computes_activations_in_bfloat16_too(monkeypatch):
    monkeypatch.setenv("RLHF_PRECISION", "")
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "gpu")
    assert precision.resolved() == precision.told("bfloat16") == "bfloat16"


def test_a_precision_that_there_is_not_is_named_with_those_there_are(monkeypatch):
    monkeypatch.setenv("RLHF_PRECISION", "float16")
    with pytest.raises(UserError, match="RLHF_PRECISION=float16: .*float32, mixed, bfloat16"):
        precision.resolved()
