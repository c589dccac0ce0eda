"""The shape of a decoder, and how a transformers configuration says it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiment_runs.configuration import check_types
from experiment_runs.errors import UserError
from rlhf_jax.language_model.rope import rope_scaling

LARGEST, MOST_LAYERS = 2**24, 1000  # of a decoder's sizes: beyond any that could be trained here
FAMILIES = ("llama", "qwen2", "qwen3")
# Fields of a config.json that the decoder is built from.
USED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "original_max_position_embeddings",
}  # fmt: skip
# Fields that say nothing about what the decoder computes: names, tokens, training, other programs.
HARMLESS = {
    "_name_or_path", "_attn_implementation_autoset", "_attn_implementation", "architectures",
    "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache", "pretraining_tp",
    "attention_dropout", "hidden_dropout", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "id2label",
    "label2id", "num_labels", "problem_type", "return_dict", "output_hidden_states",
    "output_attentions", "return_unused_kwargs", "chunk_size_feed_forward", "tokenizer_class",
    "prefix", "task_specific_params", "finetuning_task", "base_model_tp_plan",
    "base_model_pp_plan", "keys_to_ignore_at_inference", "max_window_layers", "reward_offset",
    "is_llama_config", "rope_interleaved", "transformers.js_config", "torchscript",
    "use_bfloat16", "pruned_heads", "num_return_sequences", "max_length", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "model_name",
    "max_new_tokens", "mlp_only_layers", "unsloth_version", "unsloth_fixed", "use_mrope",
}  # fmt: skip
# Fields that change what a decoder computes, with the values at which they change nothing here.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "mlp_bias": (None, False),
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
    "per_layer_config": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder; the switches tell the families apart."""

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: tuple = ()  # how longer contexts stretch positions, as (name, value)
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    output_bias: bool = False  # a bias after attention (Llama and Qwen3 with attention_bias)
    qk_norm: bool = False  # RMS norm of every query and key head (Qwen3)
    family: str = "llama"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters keep their own

    def __post_init__(self):
        check_types(self)
        sizes = ("vocab_size", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
        for field, most in (*dict.fromkeys(sizes, LARGEST).items(), ("num_layers", MOST_LAYERS)):
            if not 1 <= (value := getattr(self, field)) <= most:
                raise UserError(f"{field} is {value}; it must be from 1 to {most:,}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, dtype: str = "float32"):
        """Reads the fields of a transformers `config.json`.

        Raises:
          UserError: the family or one of its options is not supported, or a field is missing.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"config.json: model_type {family!r} is not supported; use one of {FAMILIES}"
            )
        check_fields(config, family)
        rope_theta, scaling = rope_scaling(config)
        biased = bool(config.get("attention_bias", False))
        try:
            return cls(
                vocab_size=config["vocab_size"],
                embed_dim=config["hidden_size"],
                mlp_dim=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head_dim=config.get("head_dim")
                or config["hidden_size"] // config["num_attention_heads"],
                rope_theta=rope_theta,
                rope_scaling=scaling,
                norm_epsilon=config.get("rms_norm_eps", 1e-6),
                tied_embeddings=config.get("tie_word_embeddings", False),
                attention_bias=family == "qwen2" or biased,
                output_bias=family != "qwen2" and biased,
                qk_norm=family == "qwen3",
                family=family,
                dtype=dtype,
            )
        except KeyError as error:
            raise UserError(f"config.json: field {error} is missing") from None


def check_fields(config: Mapping[str, Any], family: str) -> None:
    """Refuses a configuration with a field that is not known to leave the decoder as it is.

    Raises:
      UserError: all such fields are listed at once.
    """
    problems = []
    for name, value in config.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                known = " or ".join(repr(value) for value in NEUTRAL[name] if value is not None)
                problems.append(f"{name}={value!r}, supported is {known or 'its absence'}")
        elif name == "sliding_window":
            # Qwen's configurations name a window that they do not use
            if value is not None and (family == "llama" or config.get("use_sliding_window")):
                problems.append(f"sliding_window={value!r}, supported is its absence")
        elif name == "layer_types":
            if other := set(value or ()) - {"full_attention"}:
                problems.append(f"layer_types with {sorted(other)}, supported is 'full_attention'")
        elif name not in USED | HARMLESS:
            problems.append(f"{name}={value!r} is not known; remove it if it changes nothing")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"config.json of a {family}: what these say is not computed:\n  {listed}")
