"""A decoder-only transformer (Llama, Qwen2 and Qwen3 by configuration), its adapters and heads.

The modules are only definitions: training splits them once into a static graph and trees of
arrays. No module knows of devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model.attention import (
    attend,
    attend_cached,
    filled_cache,
    grown_cache,
    rotary,
    rotate,
)
from rlhf_jax.language_model.decoder_config import DecoderConfig
from rlhf_jax.language_model.layer_loop import Layers, arranged, through
from rlhf_jax.language_model.layers import Linear, RMSNorm, gated, logits


class Attention(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        query_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.q_proj = Linear(cfg.embed_dim, query_dim, use_bias=cfg.attention_bias, rngs=rngs)
        self.k_proj = Linear(cfg.embed_dim, kv_dim, use_bias=cfg.attention_bias, rngs=rngs)
        self.v_proj = Linear(cfg.embed_dim, kv_dim, use_bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear(query_dim, cfg.embed_dim, use_bias=cfg.output_bias, rngs=rngs)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_epsilon) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_epsilon) if cfg.qk_norm else None

    def heads(self, query, key, value, rope):
        """Queries, keys and values [batch time features] as heads, rotated."""
        query, key, value = (
            x.reshape(*x.shape[:2], -1, self.head_dim) for x in (query, key, value)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, rope), rotate(key, rope), value

    def __call__(self, x, rope, mask, dropout_key=None):
        keys = split_key(dropout_key, 4)
        query, key, value = self.heads(
            self.q_proj(x, keys[0]), self.k_proj(x, keys[1]), self.v_proj(x, keys[2]), rope
        )
        out = attend(query, key, value, mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), (key, value)

    def step(self, x, rope, visible, cache, index):
        """One new token in each column; the cache comes back with it written at `index`."""
        rows = [linear.columns(x).T[:, None] for linear in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = self.heads(*rows, rope)
        cache = grown_cache(cache, key, value, index)
        out = attend_cached(query[:, 0], cache, visible)
        return self.o_proj.columns(out.reshape(x.shape[1], -1).T), cache


class MLP(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(cfg.embed_dim, cfg.mlp_dim, rngs=rngs)
        self.up_proj = Linear(cfg.embed_dim, cfg.mlp_dim, rngs=rngs)
        self.down_proj = Linear(cfg.mlp_dim, cfg.embed_dim, rngs=rngs)

    def __call__(self, x, dropout_key=None):
        keys = split_key(dropout_key, 3)
        return self.down_proj(gated(self.gate_proj(x, keys[0]), self.up_proj(x, keys[1])), keys[2])

    def step(self, x):
        return self.down_proj.columns(gated(self.gate_proj.columns(x), self.up_proj.columns(x)))


class Block(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x, rope, mask, dropout_key=None):
        keys = split_key(dropout_key, 2)
        attended, cache = self.attention(self.input_norm(x), rope, mask, keys[0])
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), keys[1]), cache

    def step(self, x, rope, visible, cache, index):
        normed = self.input_norm.columns(x)
        attended, cache = self.attention.step(normed, rope, visible, cache, index)
        x = x + attended
        return x + self.mlp.step(self.mlp_norm.columns(x)), cache


class Decoder(nnx.Module):
    """Tokens to hidden states; `embedding` gives the logits where the embeddings are tied."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        init = jax.nn.initializers.normal(0.02)
        shape = (cfg.vocab_size, cfg.embed_dim)
        self.embedding = nnx.Param(init(rngs.params(), shape))
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.num_layers)])
        self.norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
        self.unembedding = None if cfg.tied_embeddings else nnx.Param(init(rngs.params(), shape))

    def add_adapters(self, cfg: LoRAConfig, *, rngs: nnx.Rngs) -> None:
        """Adds a low-rank adapter to every linear layer that the configuration names."""
        for block in self.blocks:
            for name in cfg.targets:
                owner = block.attention if hasattr(block.attention, name) else block.mlp
                getattr(owner, name).add_adapter(cfg, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        mask: Bool[Array, "batch time time"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "batch time embed"]:
        """Hidden states after the last norm."""
        keys = None if dropout_key is None else jax.random.split(dropout_key, len(self.blocks))
        rope = self.rope(positions, positions.shape[1])

        def passed(block, x, key):
            return block(x, rope, mask, key)[0], None

        x = self.embedding[...][tokens].astype(self.cfg.dtype)
        return self.norm(through(arranged(self.blocks), passed, x, keys)[0])

    def prefill(self, tokens, positions, mask, time: int, layers: Layers):
        """Hidden states, and each block's cache with room for `time` tokens."""
        rope = self.rope(positions, positions.shape[1])

        def passed(block, x, _):
            x, (key, value) = block(x, rope, mask)
            return x, filled_cache(key, value, time)

        x = self.embedding[...][tokens].astype(self.cfg.dtype)
        x, cache = through(layers, passed, x, None)
        return self.norm(x), cache

    def step(self, tokens, rope, visible, cache, index, layers: Layers):
        """Hidden states [embed batch] of one new token per column, and the grown cache."""

        def passed(block, x, own):
            return block.step(x, rope, visible, own, index)

        x = self.embedding[...][tokens].astype(self.cfg.dtype).T
        x, grown = through(layers, passed, x, cache)
        return self.norm.columns(x), grown

    def rope(self, positions: Int[Array, "batch time"], length: int):
        """Cosines and sines of positions below `length`, [batch time half] each."""
        tables = rotary(length, self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
        return tuple(jnp.asarray(table)[positions] for table in tables)

    def output_matrix(self) -> Float[Array, "vocab embed"]:
        """The matrix that turns hidden states into logits."""
        matrix = self.embedding if self.unembedding is None else self.unembedding
        return matrix[...]

    def logits(self, hidden: Float[Array, "*rows embed"]) -> Float[Array, "*rows vocab"]:
        """Logits in float32."""
        return logits(hidden, self.output_matrix())

    def logit_columns(self, hidden: Float[Array, "embed batch"]) -> Float[Array, "vocab batch"]:
        """The same of few hidden states, which stand in columns."""
        hidden = jax.lax.optimization_barrier(hidden)
        matrix = self.output_matrix().astype(hidden.dtype)
        found = jnp.matmul(matrix, hidden, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(found)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` independent keys, or none where dropout is off."""
    return [None] * count if key is None else list(jax.random.split(key, count))
