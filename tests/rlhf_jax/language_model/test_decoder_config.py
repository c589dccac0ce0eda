"""What a transformers configuration says is computed or refused by name."""

import importlib

import pytest

from experiment_runs.errors import UserError
from rlhf_jax.language_model.config_fields import FAMILIES, HARMLESS, NEUTRAL, USED
from rlhf_jax.language_model.decoder_config import DecoderConfig
from rlhf_jax.pretrained.model import random_model

SHAPE = dict(random_model().huggingface_config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_transformers_configurations_has_its_place(name):
    family, module = FAMILIES[name], f"transformers.models.{name.removesuffix('_text')}"
    kind = family.architecture + ("TextConfig" if name.endswith("_text") else "Config")
    config = getattr(importlib.import_module(module), kind)()
    fields = config.to_dict()
    assert not set(fields) - USED - HARMLESS - set(NEUTRAL) - family.reads - family.ignores
    whole = DecoderConfig.from_huggingface(fields)  # and as it stands it can be computed
    needed = {"model_type": name} | {
        field: fields[field]
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                      "num_attention_heads", "num_key_value_heads")
    }  # fmt: skip
    # what a file leaves out is what transformers takes
    assert DecoderConfig.from_huggingface(needed) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_no_field_has_two_places(name):
    family = FAMILIES[name]
    assert family.defaults.keys() <= USED | family.reads
    places = (USED, HARMLESS, family.reads | family.ignores)
    assert sum(map(len, places)) == len(set().union(*places))
    assert not set(NEUTRAL) & (USED | HARMLESS)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', supported is 'silu'"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "1 of 2 layers"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation='gelu', supported is"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention: .*factor",
        ),
        ("gemma3", {}, "model_type 'gemma3' is not supported; use one of .*gemma3_text"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        ("llama", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\], supported is its absence"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier=12"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_size": "32"}, "hidden_size='32' is not a whole number"),
        ("llama", {"vocab_size": None, "rms_norm_eps": "x"}, "(?s)vocab_size=None.*rms_norm_eps"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings=None is not true or false"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be a pos"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be a positive"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": "1e4"}},
            "rope_theta='1e4' must be a positive",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar=None is not a num"),
        ("gemma3_text", {"layer_types": "full_attention"}, "layer_types='full_attention' is not a"),
        ("smollm3", {"no_rope_layer_interval": None}, "no_rope_layer_interval=None is not a whole"),
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
        assert DecoderConfig.from_huggingface(config).windowed_layers == ()
