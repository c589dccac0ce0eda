"""GGUF files: their configuration, tensors and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from experiment_runs.errors import UserError
from rlhf_jax.language_model.decoder import DecoderConfig
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tensor_names import decoder_state, tensor_table
from rlhf_jax.pretrained.tokenizer import Tokenizer, byte_level

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
    """Reads a llama-family GGUF file with a byte-level BPE tokenizer, dequantized to float32."""
    reader = Reader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise UserError(f"{path}: only llama-family GGUF with a gpt2 tokenizer is supported")
    if fields["tokenizer.ggml.pre"] not in ("smollm", "gpt-2"):
        raise UserError(
            f"{path}: tokenizer.ggml.pre={fields['tokenizer.ggml.pre']!r}: only smollm and gpt-2 "
            "are read as their models do; use the folder with tokenizer.json and safetensors"
        )
    config = huggingface_config(
        fields, tied="output.weight" not in {t.name for t in reader.tensors}
    )
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    names = {theirs: hf for _, hf, theirs in tensor_table(decoder)}
    tensors = {}
    for tensor in reader.tensors:
        # a copy, because a view would keep the whole mapped file in memory
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            is_query = tensor.name.endswith("attn_q.weight")
            values = undo_permutation(
                values, decoder.num_heads if is_query else decoder.num_kv_heads
            )
        tensors[names.get(tensor.name, tensor.name)] = values
    return Pretrained(
        name=name,
        origin=f"{path.name} from {path.parent.name} (quantized weights, read as float32)",
        config=decoder,
        huggingface_config=config,
        state=decoder_state(decoder, tensors, source=str(path)),
        tokenizer=Tokenizer.of(gguf_tokenizer(fields)),
    )


def undo_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each rotated head; this puts them back."""
    interleaved = rows.reshape(heads, -1, 2, rows.shape[-1])
    return interleaved.swapaxes(1, 2).reshape(rows.shape)


def huggingface_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The `config.json` that a llama-family GGUF file stands for."""
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get(
            "llama.attention.key_length", fields["llama.embedding_length"] // heads
        ),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def gguf_tokenizer(fields: Mapping[str, Any]):
    """The byte-level BPE tokenizer whose tokens and merges a GGUF file carries."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    return byte_level(
        {token: i for i, token in enumerate(tokens)},
        [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]],
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL],
        end=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad=None,  # the file's pad token is its end token
        template=fields["tokenizer.chat_template"],
        split_digits=fields["tokenizer.ggml.pre"] == "smollm",
    )
