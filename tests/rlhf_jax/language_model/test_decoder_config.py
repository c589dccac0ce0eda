"""What a transformers configuration says is computed or refused by name."""

import importlib

import pytest

from experiment_runs.errors import UserError
from rlhf_jax.language_model.decoder_config import (
    FAMILIES,
    HARMLESS,
    NEUTRAL,
    USED,
    DecoderConfig,
)
from rlhf_jax.pretrained.model import random_model

CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
SHAPE = dict(random_model().huggingface_config)
BY_RULE = {"sliding_window", "layer_types"}  # whose meaning depends on the family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_configurations_has_its_place(family):
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    fields = getattr(module, CLASSES[family])().to_dict()
    unknown = set(fields) - USED - HARMLESS - set(NEUTRAL) - BY_RULE
    assert not unknown
    DecoderConfig.from_huggingface(fields)  # and as it stands it can be computed


def test_no_field_has_two_places():
    places = (USED, HARMLESS, set(NEUTRAL), BY_RULE)
    assert sum(map(len, places)) == len(set().union(*places))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', supported is 'silu'"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier=12"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "llama",
            {"made_up": 3, "hidden_act": "relu"},
            "(?s)relu.*made_up=3 is not known",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "needs .*low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "odd"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(family, changes, named):
    with pytest.raises(UserError, match=named):
        DecoderConfig.from_huggingface(SHAPE | {"model_type": family} | changes)


def test_a_window_that_qwen_names_and_does_not_use_is_none():
    for family in ("qwen2", "qwen3"):
        config = SHAPE | {"model_type": family, "sliding_window": 8, "use_sliding_window": False}
        DecoderConfig.from_huggingface(config)
