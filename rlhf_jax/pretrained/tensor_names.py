"""The names of tensors: ours, Hugging Face's and GGUF's; a decoder filled and emptied by them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from experiment_runs import devices
from experiment_runs.errors import UserError
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.language_model.sharding import RULES

# our path inside a block, its Hugging Face name, its GGUF name
NORMS = (
    ("input_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    ("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
)
FOUR_NORMS = (
    ("input_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    ("attended_norm.scale", "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ("mlp_norm.scale", "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("mlp_output_norm.scale", "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)
BLOCK_TENSORS = (
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


def abstract(cfg: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))


def tensor_table(cfg: DecoderConfig) -> list[tuple[str, str, str]]:
    """(our path, Hugging Face name, GGUF name) of every tensor that a decoder can have."""
    return list(TENSORS) + [
        (f"blocks.{layer}.{ours}", f"model.layers.{layer}.{hf}", f"blk.{layer}.{short}")
        for layer in range(cfg.num_layers)
        for ours, hf, short in (FOUR_NORMS if cfg.output_norms else NORMS) + BLOCK_TENSORS
    ]


def norm_offset(cfg: DecoderConfig, ours: str) -> float:
    """What a Hugging Face file has less of a tensor: Gemma's norms multiply by 1 + weight."""
    return 1.0 if cfg.family == "gemma3_text" and ours.endswith("norm.scale") else 0.0


def leaf_name(path: tuple) -> str:
    """The dotted path of a leaf of a state, e.g. "blocks.0.mlp.up_proj.kernel"."""
    return ".".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path
                    if str(part) != ".value")  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor in a file, read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def decoder_state(
    cfg: DecoderConfig, tensors: Mapping[str, StoredTensor], *, source: str
) -> nnx.State:
    """Fills a decoder with tensors under Hugging Face names, in float32.

    Each goes to its devices before the next is read, so that neither host nor device ever holds
    a second model beside the one that is made.

    Raises:
      UserError: tensors are missing, left over or of another shape; all are listed at once.
    """
    names = {ours: hf for ours, hf, _ in tensor_table(cfg)}
    state = nnx.state(abstract(cfg))
    check_tensors(cfg, state, names, tensors, source)

    def read(path: tuple) -> np.ndarray:
        ours = leaf_name(path)
        values, offset = tensors[names[ours]].read(), norm_offset(cfg, ours)
        return np.asarray(values, np.float32) + np.float32(offset) if offset else values

    return devices.read_onto(state, read, RULES)


def check_tensors(
    cfg: DecoderConfig, state: nnx.State, names: Mapping[str, str],
    tensors: Mapping[str, StoredTensor], source: str,
) -> None:  # fmt: skip
    """Stops where tensors are not those of a decoder, before any is read as a whole."""
    left, problems = dict(tensors), []
    if cfg.tied_embeddings:
        output, embedding = left.pop("lm_head.weight", None), left.get("model.embed_tokens.weight")
        if output and embedding and not np.array_equal(output.read(), embedding.read()):
            problems.append(
                "lm_head.weight differs from model.embed_tokens.weight, but config.json has "
                "tie_word_embeddings; set that to false"
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = names[leaf_name(path)]
        stored = left.pop(name, None)
        if stored is None:
            problems.append(f"{name} is missing, expected {tuple(leaf.shape)}")
        elif stored.shape != leaf.shape:
            problems.append(
                f"{name} has another shape: {stored.shape}, expected {tuple(leaf.shape)}"
            )
    problems += [f"{name} is not part of this model" for name in left if "rotary" not in name]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise UserError(
            f"{source}: {len(problems)} tensors do not fit config.json; use the weights that "
            f"belong to it:\n  {shown}"
        )


def huggingface_tensors(state: nnx.State, cfg: DecoderConfig) -> dict[str, np.ndarray]:
    """The inverse of `decoder_state`: float32 tensors under Hugging Face names."""
    names = {ours: hf for ours, hf, _ in tensor_table(cfg)}
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if (ours := leaf_name(path)) in names:
            values = np.asarray(devices.on_host(leaf), np.float32)
            offset = np.float32(norm_offset(cfg, ours))
            tensors[names[ours]] = values - offset if offset else values
    return tensors
