"""Policies: a decoder, its adapters, its value head if it has one, and what is trained."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.layers import Linear
from rlhf_jax.language_model.logprobs import response_states
from rlhf_jax.optimization.optimizer import FROZEN
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tensor_names import leaf_name


class ActorCritic(nnx.Module):
    """A policy with, or without, a critic that reads its hidden states."""

    def __init__(self, decoder: Decoder, *, critic: bool = True, rngs: nnx.Rngs):
        self.decoder = decoder
        if not critic:
            self.value = None
            return
        self.value = Linear(decoder.cfg.embed_dim, 1, use_bias=True, rngs=rngs)
        self.value.kernel[...] = jnp.zeros_like(
            self.value.kernel[...]
        )  # N+: the critic starts at 0

    def states_and_values(
        self,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        prompt: int,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "batch response embed"], Float[Array, "batch response"] | None]:
        """The policy's hidden states before each response token; the critic's estimates, if any."""
        states = response_states(self.decoder, tokens, mask, prompt, dropout_key)
        if self.value is None:
            return states, None
        return states, self.value(states.astype(jnp.float32))[..., 0]


class Policy(NamedTuple):
    """An actor-critic, split into what is trained and what is not."""

    definition: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State

    def decoder(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Static half and arrays of the decoder alone, for sampling."""
        return nnx.split(nnx.merge(*self).decoder)


def build(
    pretrained: Pretrained, lora: LoRAConfig | None, *, seed: int, critic: bool = True
) -> Policy:
    """The policy before training: the pretrained model, with adapters that change nothing yet."""
    rngs = nnx.Rngs(seed)
    decoder = nnx.merge(pretrained.definition, pretrained.state, copy=True)
    if lora is not None:
        decoder.add_adapters(lora, rngs=rngs)
    model = ActorCritic(decoder, critic=critic, rngs=rngs)
    return Policy(*nnx.split(model, lambda path, _: group(path, lora) != FROZEN, ...))


def group(path: tuple, lora: LoRAConfig | None) -> str:
    """The optimizer's group of a parameter: "value", "policy" or "frozen"."""
    name = leaf_name(path)
    if name.startswith("value."):
        return "value"
    return "policy" if lora is None or "lora_" in name else FROZEN
