"""The shape of a decoder, and how a transformers configuration says it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from experiment_runs.configuration import check_types
from experiment_runs.errors import UserError, brief
from rlhf_jax.language_model.config_fields import (
    ACTIVATIONS,
    FAMILIES,
    check_fields,
    unrotated_layers,
    windowed_layers,
)
from rlhf_jax.language_model.rope import Scaling, local_rope_theta, rope_scaling

LARGEST, MOST_LAYERS = 2**24, 1000  # of a decoder's sizes: beyond any that could be trained here


class LayerKind(NamedTuple):
    """What a layer sees of the tokens before its own, and how it tells where they stand."""

    window: int | None  # how many tokens, its own included; None is all
    rope_theta: float | None  # base of the rotary embedding; None turns nothing
    rope_scaling: Scaling


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
    unrotated_layers: tuple[int, ...] = ()  # that do not tell where tokens stand (SmolLM3)
    windowed_layers: tuple[int, ...] = ()  # that see no more than the last `window` tokens
    window: int | None = None  # the token's own included
    window_rope_theta: float | None = None  # base in windowed layers, where it differs (Gemma 3)
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    output_bias: bool = False  # a bias after attention (Llama and Qwen3 with attention_bias)
    qk_norm: bool = False  # RMS norm of every query and key head (Qwen3, Gemma 3)
    query_factor: float = 1.0  # of queries, beside 1 / sqrt(head_dim) (Gemma 3)
    embedding_factor: float = 1.0  # of what goes into the first block (Gemma 3)
    output_norms: bool = False  # also of what attention and MLP give (Gemma 3)
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
    family: str = "llama"
    # "mixed": products have bfloat16 operands, all else is in float32; "bfloat16": activations too.
    # What is trained stays in float32.
    dtype: Literal["float32", "mixed", "bfloat16"] = "float32"

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
        if self.windowed_layers and not 1 <= (self.window or 0) <= LARGEST:
            raise UserError(f"sliding_window is {self.window}; it must be from 1 to {LARGEST:,}")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """One for each layer."""
        full = LayerKind(None, self.rope_theta, self.rope_scaling)
        windowed = full._replace(window=self.window)
        if self.window_rope_theta is not None:
            windowed = LayerKind(self.window, self.window_rope_theta, ())
        kinds = [windowed if i in self.windowed_layers else full for i in range(self.num_layers)]
        for i in self.unrotated_layers:
            kinds[i] = LayerKind(kinds[i].window, None, ())
        return tuple(kinds)

    @property
    def products(self) -> str:
        """dtype of the operands of matrix products."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def activations(self) -> str:
        """dtype of what goes from layer to layer."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, dtype: str = "float32"):
        """Reads the fields of a transformers `config.json`.

        Raises:
          UserError: the family or one of its options is not supported, or a field is missing.
        """
        check_fields(config)
        family = FAMILIES[config["model_type"]]
        given = family.defaults | config
        gemma, biased = family.architecture == "Gemma3", bool(given.get("attention_bias"))
        try:
            layers, heads = given["num_hidden_layers"], given["num_attention_heads"]
            if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
                raise UserError(
                    f"num_layers is {brief(layers)}; it must be from 1 to {MOST_LAYERS:,}"
                )
            head_dim = given.get("head_dim") or family.defaults.get("head_dim")
            head_dim = head_dim or given["hidden_size"] // heads
            theta, scaling = rope_scaling(config, default=family.defaults.get("rope_theta", 1e4))
            windowed = windowed_layers(given)
            return cls(
                vocab_size=given["vocab_size"],
                embed_dim=given["hidden_size"],
                mlp_dim=given["intermediate_size"],
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=given.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                rope_theta=theta,
                rope_scaling=scaling,
                unrotated_layers=unrotated_layers(given),
                windowed_layers=windowed,
                window=given["sliding_window"] if windowed else None,
                window_rope_theta=local_rope_theta(given) if gemma else None,
                norm_epsilon=given.get("rms_norm_eps", 1e-6),
                tied_embeddings=given.get("tie_word_embeddings", False),
                attention_bias=biased or family.architecture == "Qwen2",
                output_bias=biased and family.architecture != "Qwen2",
                qk_norm=gemma or family.architecture == "Qwen3",
                query_factor=(head_dim / given["query_pre_attn_scalar"]) ** 0.5 if gemma else 1.0,
                embedding_factor=given["hidden_size"] ** 0.5 if gemma else 1.0,
                output_norms=gemma,
                activation=ACTIVATIONS[given["hidden_activation" if gemma else "hidden_act"]],
                family=config["model_type"],
                dtype=dtype,
            )
        except KeyError as error:
            raise UserError(f"config.json: field {error} is missing") from None
