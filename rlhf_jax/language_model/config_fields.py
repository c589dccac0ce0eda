"""The fields of transformers' `config.json`: what each family is built from, what changes nothing.

A field that is neither used nor known to leave the decoder as it is refuses the model, by name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiment_runs.errors import UserError


class Family(NamedTuple):
    """What tells a family's configurations apart from others."""

    architecture: str  # how its classes in transformers are called
    reads: set[str]  # fields, beside those that all read
    defaults: dict[str, Any]  # of fields that a config.json may leave out
    ignores: set[str]  # fields of older files, which its class in transformers does not read


SWITCHED = {"use_sliding_window", "sliding_window", "max_window_layers"}
FAMILIES = {
    "llama": Family("Llama", {"hidden_act"}, {"hidden_act": "silu"}, {"max_window_layers"}),
    "mistral": Family(
        "Mistral", {"hidden_act", "sliding_window"},
        {"hidden_act": "silu", "sliding_window": 4096},
        {"max_window_layers", "use_sliding_window"},
    ),
    "qwen2": Family(
        "Qwen2", {"hidden_act", *SWITCHED},
        {"hidden_act": "silu", "sliding_window": 4096, "max_window_layers": 28}, set(),
    ),
    "qwen3": Family(
        "Qwen3", {"hidden_act", *SWITCHED},
        {"hidden_act": "silu", "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        set(),
    ),
    "smollm3": Family(
        "SmolLM3", {"hidden_act", "no_rope_layers", "no_rope_layer_interval", *SWITCHED},
        {"hidden_act": "silu", "rope_theta": 2e6, "tie_word_embeddings": True,
         "no_rope_layer_interval": 4},
        set(),
    ),
    "gemma3_text": Family(
        "Gemma3",
        {"hidden_activation", "sliding_window", "sliding_window_pattern", "query_pre_attn_scalar",
         "rope_local_base_freq"},
        {"head_dim": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096,
         "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
         "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act", "_sliding_window_pattern"},
    ),
}  # fmt: skip
# as transformers calls an activation: its name here
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Fields that every decoder is built from.
USED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_types",
    "tie_word_embeddings", "attention_bias", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "original_max_position_embeddings",
}  # fmt: skip
# What the values of fields are: of those that must have one, and of those that may be null.
VALUES = (
    ("a whole number", {int},
     {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
      "sliding_window_pattern", "max_window_layers", "no_rope_layer_interval"},
     {"num_key_value_heads", "head_dim", "sliding_window"}),
    ("a number", {int, float},
     {"rms_norm_eps", "query_pre_attn_scalar", "rope_local_base_freq"}, {"rope_theta"}),
    ("true or false", {bool}, {"tie_word_embeddings"}, {"attention_bias", "use_sliding_window"}),
    ("a list", {list}, set(), {"layer_types", "no_rope_layers"}),
    ("an object", {dict}, set(), {"rope_scaling", "rope_parameters"}),
)  # fmt: skip
# Fields that say nothing about what the decoder computes: names, tokens, training, other programs.
HARMLESS = {
    "_name_or_path", "_attn_implementation_autoset", "_attn_implementation", "architectures",
    "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache", "pretraining_tp",
    "attention_dropout", "hidden_dropout", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "id2label",
    "label2id", "num_labels", "problem_type", "return_dict", "output_hidden_states",
    "output_attentions", "return_unused_kwargs", "chunk_size_feed_forward", "tokenizer_class",
    "prefix", "task_specific_params", "finetuning_task", "base_model_tp_plan",
    "base_model_pp_plan", "keys_to_ignore_at_inference", "reward_offset", "cache_implementation",
    "is_llama_config", "rope_interleaved", "transformers.js_config", "torchscript",
    "use_bfloat16", "pruned_heads", "model_name", "mlp_only_layers", "unsloth_version",
    "unsloth_fixed", "use_mrope",
    # of generation, which older versions of transformers write into this file
    "num_return_sequences", "max_length", "min_length", "do_sample", "temperature", "top_k",
    "top_p", "repetition_penalty", "max_new_tokens", "early_stopping", "num_beams", "typical_p",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "num_beam_groups", "diversity_penalty", "tf_legacy_loss",
}  # fmt: skip
# Fields that change what a decoder computes, with the values at which they change nothing in a
# family that does not read them.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
    "is_decoder": (None, True, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "use_qk_norm": (None,),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "rope_local_base_freq": (None,),
    "per_layer_config": (None,),
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuses a configuration with a field that is not known to leave the decoder as it is.

    Raises:
      UserError: the family is not supported, or one of its fields; all are listed at once.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UserError(
            f"config.json: model_type {name!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    problems = [
        f"{field}={config[field]!r} is not {what}"
        for what, kinds, needed, optional in VALUES
        for field in sorted((needed | optional) & (USED | family.reads) & config.keys())
        if type(config[field]) not in kinds and not (config[field] is None and field in optional)
    ]
    for field, value in config.items():
        if field in USED | HARMLESS | family.ignores:
            continue
        if field in ("hidden_act", "hidden_activation") and field in family.reads:
            if value not in ACTIVATIONS:
                problems.append(f"{field}={value!r}, supported is {listed(ACTIVATIONS)}")
        elif field in family.reads:
            continue
        elif field not in NEUTRAL:
            problems.append(f"{field}={value!r} is not known; remove it if it changes nothing")
        elif value not in NEUTRAL[field]:
            known = listed(value for value in NEUTRAL[field] if value is not None)
            problems.append(f"{field}={value!r}, supported is {known or 'its absence'}")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"config.json of a {name}: what these say is not computed:\n  {lines}")


def unrotated_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the layers without rotary embedding (SmolLM3), of a config with its defaults."""
    if "no_rope_layers" not in FAMILIES[config["model_type"]].reads:
        return ()
    layers, rotated = range(config["num_hidden_layers"]), config.get("no_rope_layers")
    if rotated is None:
        rotated = [(layer + 1) % config["no_rope_layer_interval"] for layer in layers]
    if len(rotated) < len(layers):
        raise UserError(
            f"config.json: no_rope_layers has {len(rotated)} entries for {len(layers)} layers"
        )
    return tuple(layer for layer in layers if not rotated[layer])


def windowed_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the layers that see a window, of a config with its family's defaults.

    Raises:
      UserError: layer_types does not fit the other fields.
    """
    family, layers = config["model_type"], range(config["num_hidden_layers"])
    reads = FAMILIES[family].reads
    there = "sliding_window" in reads and config.get("sliding_window") is not None
    there = there and ("use_sliding_window" not in reads or bool(config.get("use_sliding_window")))

    def implied(layer):  # where there are windows
        if family == "gemma3_text":
            return (layer + 1) % config["sliding_window_pattern"] != 0
        if family == "smollm3":
            return layer in unrotated_layers(config)
        return layer >= config["max_window_layers"] if "max_window_layers" in reads else True

    windowed = tuple(layer for layer in layers if there and implied(layer))
    types = config.get("layer_types")
    if types is None:
        return windowed
    given = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    own = family not in ("llama", "mistral")  # these read no layer_types
    if (
        set(types) - {"full_attention", "sliding_attention"}
        or len(types) != len(layers)
        or given != windowed
        and not (own and (there or not given))
    ):
        raise UserError(
            f"config.json of a {family}: layer_types with {sorted(set(types))} for {len(types)} of "
            f"{len(layers)} layers does not fit its other fields; supported are 'full_attention' "
            "and, where sliding_window is used, 'sliding_attention'"
        )
    return given


def listed(values) -> str:
    return " or ".join(map(repr, values))
