"""A decoder-only transformer, its adapters and heads; its configuration tells the families apart.

The modules are only definitions: training splits them once into a static graph and trees of
arrays. Where matrices lie divided over devices, a pass over whole texts gathers them block by
block; a step, whose hidden states are few, brings these to the matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from experiment_runs import devices
from experiment_runs.products import dithered, product
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
from rlhf_jax.language_model.layers import (
    Linear,
    RMSNorm,
    columns_together,
    gated,
    gelu_gated,
    logits,
)
from rlhf_jax.language_model.sharding import gathered

ACTIVATIONS = {"silu": gated, "gelu_tanh": gelu_gated}


class Attention(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        query_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.head_dim, self.query_factor = cfg.head_dim, cfg.query_factor
        self.products = cfg.products
        linear = functools.partial(Linear, products=cfg.products, rngs=rngs)
        self.q_proj = linear(cfg.embed_dim, query_dim, use_bias=cfg.attention_bias)
        self.k_proj = linear(cfg.embed_dim, kv_dim, use_bias=cfg.attention_bias)
        self.v_proj = linear(cfg.embed_dim, kv_dim, use_bias=cfg.attention_bias)
        self.o_proj = linear(query_dim, cfg.embed_dim, use_bias=cfg.output_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_epsilon) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_epsilon) if cfg.qk_norm else None

    def heads(self, query, key, value, rope):
        """Queries, keys and values [batch time features] as heads, rotated."""
        query, key, value = (
            x.reshape(*x.shape[:2], -1, self.head_dim) for x in (query, key, value)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.query_factor != 1:
            query = query * jnp.asarray(self.query_factor, query.dtype)
        return rotate(query, rope), rotate(key, rope), value

    def __call__(self, x, rope, mask, dropout_key=None):
        keys = split_key(dropout_key, 4)
        query, key, value = self.heads(
            self.q_proj(x, keys[0]), self.k_proj(x, keys[1]), self.v_proj(x, keys[2]), rope
        )
        out = attend(query, key, value, mask, self.products)
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
        linear = functools.partial(Linear, products=cfg.products, rngs=rngs)
        self.gate_proj = linear(cfg.embed_dim, cfg.mlp_dim)
        self.up_proj = linear(cfg.embed_dim, cfg.mlp_dim)
        self.down_proj = linear(cfg.mlp_dim, cfg.embed_dim)
        self.activation = cfg.activation

    def __call__(self, x, dropout_key=None):
        keys = split_key(dropout_key, 3)
        gate, up = self.gate_proj(x, keys[0]), self.up_proj(x, keys[1])
        return self.down_proj(ACTIVATIONS[self.activation](gate, up), keys[2])

    def step(self, x):
        gate, up = self.gate_proj.columns(x), self.up_proj.columns(x)
        return self.down_proj.columns(ACTIVATIONS[self.activation](gate, up))


class Block(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon)
        self.mlp = MLP(cfg, rngs=rngs)
        self.attended_norm = RMSNorm(cfg.embed_dim, cfg.norm_epsilon) if cfg.output_norms else None
        self.mlp_output_norm = (
            RMSNorm(cfg.embed_dim, cfg.norm_epsilon) if cfg.output_norms else None
        )

    def __call__(self, x, rope, mask, dropout_key=None):
        keys = split_key(dropout_key, 2)
        out, cache = self.attention(self.input_norm(x), rope, mask, keys[0])
        x = x + (out if self.attended_norm is None else self.attended_norm(out))
        out = self.mlp(self.mlp_norm(x), keys[1])
        return x + (out if self.mlp_output_norm is None else self.mlp_output_norm(out)), cache

    def step(self, x, rope, visible, cache, index):
        normed = self.input_norm.columns(x)
        out, cache = self.attention.step(normed, rope, visible, cache, index)
        x = x + (out if self.attended_norm is None else self.attended_norm.columns(out))
        out = self.mlp.step(self.mlp_norm.columns(x))
        return x + (
            out if self.mlp_output_norm is None else self.mlp_output_norm.columns(out)
        ), cache


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
        ropes = self.rope(positions, positions.shape[1])
        masks = self.windows(mask, positions[:, :, None], positions[:, None, :])

        def passed(block, x, key, kind):
            return block(x, chosen(ropes, kind), chosen(masks, kind), key)[0], None

        x = self.embedded(tokens)
        return self.norm(through(arranged(self.blocks), passed, x, keys, self.kinds())[0])

    def prefill(self, tokens, positions, mask, time: int, layers: Layers):
        """Hidden states, and each block's cache with room for `time` tokens."""
        ropes = self.rope(positions, positions.shape[1])
        masks = self.windows(mask, positions[:, :, None], positions[:, None, :])

        def passed(block, x, kind):
            x, (key, value) = block(x, chosen(ropes, kind), chosen(masks, kind))
            key, value = (part.astype(self.cfg.products) for part in (key, value))
            return x, filled_cache(key, value, time)

        x, cache = through(layers, passed, self.embedded(tokens), self.kinds())
        return self.norm(x), cache

    def step(self, tokens, ropes, visible, cache, index, layers: Layers):
        """Hidden states [embed batch] of one new token per column, and the grown cache."""
        slots = np.arange(math.prod(visible.shape[1:])).reshape(1, *visible.shape[1:])
        visible = self.windows(visible, index, slots)

        def passed(block, x, own, kind):
            return block.step(x, chosen(ropes, kind), chosen(visible, kind), own, index)

        x = self.embedded(tokens).T
        x, grown = through(layers, passed, x, cache, self.kinds(), gather=False)
        return self.norm.columns(x), grown

    def embedded(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows embed"]:
        """What goes into the first block: rounded, as the whole matrix is where it is frozen."""
        x = dithered(gathered(self.embedding[...])[tokens], self.cfg.products, rows=tokens)
        x = x.astype(self.cfg.activations)
        factor = self.cfg.embedding_factor
        return x if factor == 1 else x * jnp.asarray(factor, x.dtype)

    def kinds(self) -> np.ndarray | None:
        """The number of every layer's kind; None where there is only one."""
        kinds = self.cfg.layer_kinds
        if len(set(kinds)) == 1:
            return None
        return np.array([list(dict.fromkeys(kinds)).index(kind) for kind in kinds])

    def rope(self, positions: Int[Array, "batch time"], length: int):
        """For each kind of layer, cosines and sines of positions below `length`."""
        return [
            tuple(
                jnp.asarray(table)[positions]
                for table in rotary(length, self.cfg.head_dim, kind.rope_theta, kind.rope_scaling)
            )
            for kind in dict.fromkeys(self.cfg.layer_kinds)
        ]

    def windows(
        self,
        mask: Bool[Array, "batch *axes"],
        queries: Int[Array, "..."],
        keys: Int[Array, "..."] | Int[np.ndarray, "..."],
    ) -> list[Bool[Array, "batch *axes"]]:
        """For each kind of layer, which keys are seen from the positions of queries."""
        return [
            mask if kind.window is None else mask & (queries - keys < kind.window)
            for kind in dict.fromkeys(self.cfg.layer_kinds)
        ]

    def output_matrix(self) -> Float[Array, "vocab embed"]:
        """The matrix that turns hidden states into logits."""
        return gathered(self.kept_output_matrix())

    def kept_output_matrix(self) -> Float[Array, "vocab embed"]:
        """The same as it lies."""
        matrix = self.embedding if self.unembedding is None else self.unembedding
        return matrix[...]

    def logits(self, hidden: Float[Array, "*rows embed"]) -> Float[Array, "*rows vocab"]:
        """Logits in float32."""
        return logits(hidden.astype(self.cfg.products), self.output_matrix())

    def logit_columns(self, hidden: Float[Array, "embed batch"]) -> Float[Array, "vocab batch"]:
        """The same of few hidden states, which stand in columns."""
        hidden = columns_together(hidden.astype(self.cfg.products))
        hidden = jax.lax.optimization_barrier(hidden)
        matrix = dithered(self.kept_output_matrix(), hidden.dtype)
        found = columns_together(product("ve,eb->vb", matrix, hidden))
        return devices.constrained(jax.lax.optimization_barrier(found), None, "data")


def chosen(views: list, kind: Shaped[Array, ""] | np.integer | None):
    """What a layer of one kind sees; in a loop over layers its number is no constant."""
    if kind is None:
        return views[0]
    if isinstance(kind, jax.Array):
        return jax.tree.map(lambda *each: jnp.stack(each)[kind], *views)
    return views[kind]


def for_products(state: nnx.State, dtype: str) -> nnx.State:
    """Weights in the dtype that they are multiplied in, which gives the same results.

    Args:
      state: of a decoder, or of a model that has one; the heads stay in float32.
      dtype: `products` of the decoder's configuration.
    """

    def kept(path, x):
        multiplied = {"blocks", "embedding", "unembedding"}.intersection(
            getattr(key, "key", None) for key in path
        )
        return dithered(x, dtype) if multiplied and x.ndim > 1 else x

    return jax.tree_util.tree_map_with_path(kept, state)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` independent keys, or none where dropout is off."""
    return [None] * count if key is None else list(jax.random.split(key, count))
