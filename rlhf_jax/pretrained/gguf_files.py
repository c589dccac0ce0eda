"""GGUF files: their configuration, tensors and tokenizer."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from experiment_runs.errors import UserError
from rlhf_jax.language_model.config_fields import FAMILIES
from rlhf_jax.language_model.decoder import DecoderConfig
from rlhf_jax.language_model.rope import rope_frequencies
from rlhf_jax.pretrained.gguf_tokenizer import gguf_tokenizer
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tensor_names import (
    StoredTensor,
    decoder_state,
    norm_offset,
    tensor_table,
)
from rlhf_jax.pretrained.tokenizer import Tokenizer

# by general.architecture: the family, and whether its files interleave the halves of heads
ARCHITECTURES = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma3": ("gemma3_text", False),
    "smollm3": ("smollm3", True),
}
# What is read of an architecture's fields, by all and by Gemma 3.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type",
}  # fmt: skip
WINDOWS = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
# How a file says what config.json says of a stretched rotary embedding.
SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# The values at which fields that are not read change nothing; any other field is refused.
NEUTRAL = {
    "attention.causal": (True,), "attention.scale": (0,), "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,), "attention.sliding_window": (0,), "expert_count": (0,),
    "expert_used_count": (0,), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,),
    "logit_scale": (0, 1), "embedding_scale": (0, 1), "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,), "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1), "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.finetuned": (False, True), "tensor_data_layout": ("Meta AI original pth",),
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"

LONGEST_PADDING = 2**16  # bytes behind the last tensor
MOST_VALUES = 5_000_000  # in the header of a file; a large vocabulary makes two million


class Reader(gguf.GGUFReader):
    """The library's reader, which would go on for ever behind the end of a damaged file."""

    values = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        found = super()._get(offset, dtype, count, override_order)
        self.values += 1
        if len(found) < count or self.values > MOST_VALUES:
            raise ValueError("it ends within a value, or its header has no end")
        return found


def load_gguf(path: Path, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads a GGUF file whose numbers the library knows, as float32.

    Raises:
      UserError: it is a part of a model, or its architecture, tokenizer, rotary embedding, another
        field or a kind of its numbers is not read.
    """
    reader = Reader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if (parts := fields.get("split.count", 1)) > 1:
        raise UserError(
            f"{path}: split.count={parts}: one of {parts} parts of a model; join them with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    if (kind := fields.get("general.type", "model")) != "model":
        raise UserError(
            f"{path}: general.type={kind!r}, not a model; merge an adapter into its model first"
        )
    if (architecture := fields["general.architecture"]) not in ARCHITECTURES:
        raise UserError(
            f"{path}: a GGUF file of architecture {architecture!r}; use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    tokenizer = gguf_tokenizer(fields, str(path))  # before the tensors, which take long to read
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = read_tensor(tensors.pop(ROPE_FACTORS), path) if ROPE_FACTORS in tensors else None
    config = huggingface_config(fields, tensors, factors, source=str(path))
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    table = {theirs: (ours, hf) for ours, hf, theirs in tensor_table(decoder)}
    interleaved = ARCHITECTURES[architecture][1]

    def converted(key: str, ours: str) -> np.ndarray:
        values = read_tensor(tensors[key], path)
        if interleaved and ".q_proj." in ours:
            values = undo_permutation(values, decoder.num_heads)
        if interleaved and ".k_proj." in ours:
            values = undo_permutation(values, decoder.num_kv_heads)
        if offset := norm_offset(decoder, ours):  # their files have it added
            values = values - np.float32(offset)
        return values

    stored = {}
    for key, tensor in tensors.items():
        ours, hf = table.get(key, ("", key))
        shape = tuple(int(size) for size in reversed(tensor.shape))
        stored[hf] = StoredTensor(shape, functools.partial(converted, key, ours))
    ends = [
        fields[key]
        for role in ("eos", "eot")
        if (key := f"tokenizer.ggml.{role}_token_id") in fields
    ]
    return Pretrained(
        name=name,
        origin=f"{path.name} from {path.parent.name} (quantized weights, read as float32)",
        config=decoder,
        huggingface_config=config,
        state=decoder_state(decoder, stored, source=str(path)),
        tokenizer=Tokenizer.of(tokenizer, ends=ends, embeddings=decoder.vocab_size),
    )


def check_end(path: Path) -> None:
    """Refuses a file that does not end where its header says, as one with a hole does not.

    Raises:
      UserError: it is longer.
      ValueError: it is shorter, or no GGUF file.
    """
    tensors = Reader(path).tensors
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors), default=0)
    if (size := path.stat().st_size) > end + LONGEST_PADDING:
        raise UserError(f"{path}: {size:,} bytes, its header says {end:,}; download it again")


def read_tensor(tensor: gguf.ReaderTensor, path: Path) -> np.ndarray:
    """Its numbers in float32; a copy, because a view would keep the whole mapped file in memory."""
    try:
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} is {tensor.tensor_type.name}, which is not read; use a file "
            "of another quantization, such as Q8_0 or Q4_K_M"
        ) from None


def undo_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each rotated head; this puts them back."""
    interleaved = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(rows.shape)


def huggingface_config(
    fields: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
    rope_factors: np.ndarray | None,
    *,
    source: str,
) -> dict[str, Any]:
    """The `config.json` that a GGUF file stands for.

    Raises:
      UserError: a field says what is not computed here.
    """
    architecture = fields["general.architecture"]
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    family = ARCHITECTURES[architecture][0]
    width, heads = own["embedding_length"], own["attention.head_count"]
    head_dim = own.get("attention.key_length", width // heads)
    read = READ | SCALING.keys() | (WINDOWS if family == "gemma3_text" else set())
    problems = [
        f"{key}={value}"
        for key, value in own.items()
        if key not in read and value not in NEUTRAL.get(key, ())
    ]
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            problems.append(f"{key}={own[key]} beside heads of {head_dim}")
    if problems:
        raise UserError(f"{source}: what these say is not computed: {', '.join(problems)}")
    base = float(own.get("rope.freq_base", 1e4))
    config = {
        "architectures": [f"{FAMILIES[family].architecture}ForCausalLM"],
        "model_type": family,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rope_theta": base,
        "rms_norm_eps": float(own["attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": family != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    if scaling := rope_scaling(own, head_dim, base, rope_factors, source):
        config["rope_scaling"] = scaling
    if family == "gemma3_text":
        del config["hidden_act"], config["mlp_bias"]
        layers, wide = config["num_hidden_layers"], own["block_count"] == 62  # the one of 27B
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": width // heads if wide else head_dim,
            "sliding_window": own["attention.sliding_window"],
            "rope_local_base_freq": float(own.get("rope.freq_base_swa", 1e4)),
            "layer_types": layer_types(own.get("attention.sliding_window_pattern", 6), layers),
        }
    return config


def layer_types(pattern: int | list[bool], layers: int) -> list[str]:
    """Which layers see a window: all but every so manyth, or those that are named."""
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def rope_scaling(
    own: Mapping[str, Any],
    head_dim: int,
    base: float,
    factors: np.ndarray | None,
    source: str,
) -> dict[str, Any] | None:
    """How a file stretches its rotary embedding, as a `config.json` says it."""
    kind = own.get("rope.scaling.type", "none")
    if kind != "none" and factors is None:
        given = {name: own[key] for key, name in SCALING.items() if key in own}
        return {"rope_type": kind, **given}
    if factors is None:
        return None
    # Files of Llama 3 carry what each frequency is divided by. The other numbers are the same in
    # all of these models.
    scaling = {
        "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    names = {"kind": "llama3", **{key: scaling[key] for key in scaling if key != "rope_type"}}
    expected = (
        rope_frequencies(head_dim, base)[0] / rope_frequencies(head_dim, base, (*names.items(),))[0]
    )
    if (
        kind != "none"
        or factors.shape != expected.shape
        or not np.allclose(factors, expected, rtol=1e-4)
    ):
        raise UserError(
            f"{source}: {ROPE_FACTORS} is not that of Llama 3.1 or 3.2; use the folder with "
            "config.json and safetensors"
        )
    return scaling
