"""Linear layers with their low-rank adapters, norms and gates, with gradients of their own."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiment_runs import devices
from experiment_runs.products import dithered, matmul, product
from rlhf_jax.config import LoRAConfig


class Linear(nnx.Module):
    """An affine map, with a low-rank adapter where one has been added.

    Matrices are [outputs, inputs], as in the files that they come from.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = False,
        products: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.products = products  # dtype of the operands
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        self.scale = self.dropout = 0.0

    def add_adapter(self, cfg: LoRAConfig, *, rngs: nnx.Rngs) -> None:
        """Adds an adapter that at first changes nothing: A is random, B zero."""
        outputs, inputs = self.kernel.shape
        # uniform within 1 / sqrt(inputs), as PEFT draws A
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", 1, 0)
        self.lora_a = nnx.LoRAParam(init(rngs.params(), (cfg.rank, inputs)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((outputs, cfg.rank)))
        self.scale, self.dropout = cfg.alpha / cfg.rank, cfg.dropout

    def __call__(self, x, dropout_key=None):
        y = matmul(x, self.kernel[...], self.products)
        if self.bias is not None:
            y = (y + jnp.broadcast_to(self.bias[...], y.shape)).astype(x.dtype)
        if self.lora_a is None:
            return y
        if dropout_key is not None and self.dropout:
            kept = round(256 * (1 - self.dropout))
            x = jnp.where(random_bytes(dropout_key, x.shape) < kept, x * (256 / kept), 0)
        low_rank = matmul(x, self.lora_a[...], self.products)
        return y + self.scale * matmul(low_rank, self.lora_b[...], self.products)

    def columns(self, x: Float[Array, "inputs batch"]) -> Float[Array, "outputs batch"]:
        """The same of few vectors, which stand in columns.

        On a CPU a matrix that stands on the left is read where it lies, one on the right is
        rearranged for every product, which costs a fifth more for few vectors. The barriers keep
        XLA from turning the product around where rows become columns.
        """
        dtype = x.dtype

        def applied(matrix, x):
            matrix = dithered(matrix[...], self.products)
            x = jax.lax.optimization_barrier(columns_together(x.astype(self.products)))
            return columns_together(product("oi,ib->ob", matrix, x, dtype))

        y = jax.lax.optimization_barrier(applied(self.kernel, x))
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(dtype)[:, None], y.shape)
        if self.lora_a is None:
            return y
        return y + self.scale * applied(self.lora_b, applied(self.lora_a, x))


def columns_together(x: Float[Array, "features batch"]) -> Float[Array, "features batch"]:
    """All columns on every device, which has the part of the features that its matrices have."""
    return devices.constrained(x, devices.ANY, None)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x):
        return normalized(x, self.scale[...], self.epsilon)

    def columns(self, x: Float[Array, "size batch"]) -> Float[Array, "size batch"]:
        """The same of vectors that stand in columns."""
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=0, keepdims=True) + self.epsilon)
        return (jnp.broadcast_to(self.scale[...][:, None], x.shape) * unit).astype(x.dtype)


def logits(
    hidden: Float[Array, "*rows embed"], matrix: Float[Array, "vocab embed"]
) -> Float[Array, "*rows vocab"]:
    """Logits in float32 by a decoder's output matrix."""
    return product("...e,ve->...v", hidden, dithered(matrix, hidden.dtype))


# The two functions below keep little more than their arguments for the gradient. XLA would find
# what is computed twice and keep it all the same, so that the gradients write it in another way.
@jax.custom_vjp
def gated(
    gate: Float[Array, "*rows inner"], up: Float[Array, "*rows inner"]
) -> Float[Array, "*rows inner"]:
    """SwiGLU between its projections: silu(gate) * up (Shazeer, 2020)."""
    return jax.nn.silu(gate) * up


def _gated_backward(saved, d_out):
    dtype, (gate, up, d_out) = d_out.dtype, (x.astype(jnp.float32) for x in (*saved, d_out))
    gate = jnp.where(jnp.isnan(d_out), jnp.nan, gate)  # not before the gradient comes
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(dtype), (d_out * gate * sigmoid).astype(dtype)


@jax.checkpoint
def gelu_gated(
    gate: Float[Array, "*rows inner"], up: Float[Array, "*rows inner"]
) -> Float[Array, "*rows inner"]:
    """The same with the normal distribution's function, as a tangent: gelu(gate) * up."""
    return jax.nn.gelu(gate, approximate=True) * up


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalized(
    x: Float[Array, "*rows size"], scale: Float[Array, "size"], epsilon: float
) -> Float[Array, "*rows size"]:
    """Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""
    return _normalized_forward(x, scale, epsilon)[0]


def _normalized_forward(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    out = jnp.broadcast_to(scale, x.shape) * (wide * inverse)
    return out.astype(x.dtype), (x, scale, inverse)


def _normalized_backward(epsilon, saved, d_out):
    x, scale, inverse = saved
    wide, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32) * inverse
    d_unit = d_out * jnp.broadcast_to(scale, x.shape)
    d_x = d_unit - wide * (inverse**2 * jnp.mean(d_unit * wide, axis=-1, keepdims=True))
    d_scale = (d_out * wide).sum(axis=tuple(range(x.ndim - 1)))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


normalized.defvjp(_normalized_forward, _normalized_backward)


def random_bytes(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform integers below 256: four of a random word, where JAX draws a word for each."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)
    spread = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return spread.reshape(*shape[:-1], -1)[..., : shape[-1]]
