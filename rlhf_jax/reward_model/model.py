"""The reward model as an object: a decoder with a scalar head that scores responses."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiment_runs.checkpoints import load_weights
from experiment_runs.devices import filled, on_host, over_devices, sharded
from experiment_runs.errors import UserError
from experiment_runs.run import Run
from rlhf_jax.config import LoRAConfig, RewardConfig, lora_config
from rlhf_jax.data.dialogues import Conversation
from rlhf_jax.language_model.attention import block_mask
from rlhf_jax.language_model.decoder import Decoder, for_products
from rlhf_jax.language_model.layers import Linear
from rlhf_jax.language_model.sampling import (
    Responses,
    draw_keys,
    ends_response,
    in_parts,
    sample,
    whole_part,
)
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import prompt_rows
from rlhf_jax.pretrained.tensor_names import leaf_name
from rlhf_jax.reward_model.packing import PairBatch

SCORED = 16  # responses that are scored at a time, at most


class RewardScale(nnx.Variable):
    """Centre and gain of the reward; set after training, never trained."""


class RewardModel(nnx.Module):
    """A scalar for a whole response, read where its end token stands, or at the end of a tail."""

    def __init__(self, decoder: Decoder, *, rngs: nnx.Rngs):
        embed = decoder.cfg.embed_dim
        self.decoder = decoder
        self.score = Linear(embed, 1, rngs=rngs)
        # N(0, 1 / (d + 1)), as in Stiennon et al. (2020) and N+
        self.score.kernel[...] = jax.random.normal(rngs.params(), (1, embed)) / math.sqrt(embed + 1)
        self.offset = RewardScale(jnp.zeros(()))
        self.gain = RewardScale(jnp.ones(()))
        # tokens after the end, where a model was trained to read them; None: not even the end
        self.tail: tuple[int, ...] | None = ()

    def scores(self, hidden: Float[Array, "items embed"]) -> Float[Array, "items"]:
        """Raw scores, float32."""
        return self.score(hidden.astype(jnp.float32))[:, 0]

    def pairs(self, batch: PairBatch, dropout_key: Array | None = None) -> Float[Array, "replies"]:
        """Raw score of every reply of packed posts."""
        mask = block_mask(batch.documents, batch.segments)
        hidden = self.decoder(batch.tokens, batch.positions, mask, dropout_key=dropout_key)
        return self.scores(hidden[batch.end_row, batch.end_column])

    def __call__(
        self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
    ) -> Float[Array, "batch"]:
        """Normalised reward of prompts with one response each, read at the last real token.

        Args:
          tokens: prompt and response in the template, padded on either side or both.
          mask: True on real tokens.
        """
        documents = jnp.where(mask, 0, -1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden = self.decoder(tokens, positions, block_mask(documents, jnp.zeros_like(documents)))
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        raw = self.scores(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
        return (raw - self.offset[...]) * self.gain[...]


class FrozenRewardModel(NamedTuple):
    """A frozen reward model: the static half and its arrays."""

    definition: nnx.GraphDef
    state: nnx.State

    def for_products(self) -> "FrozenRewardModel":
        """With weights in the dtype that they are multiplied in, for scoring alone."""
        products = nnx.merge(*self).decoder.cfg.products
        return self._replace(state=for_products(self.state, products))


def initial(
    pretrained: Pretrained, seed: int, lora: LoRAConfig | None = None
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(definition, trainable parameters, frozen ones and the reward's scale) before training.

    With adapters, these and the head are trained.
    """
    decoder = nnx.merge(pretrained.definition, pretrained.state)
    rngs = nnx.Rngs(seed)
    model = RewardModel(decoder, rngs=rngs)
    if lora is not None:
        decoder.add_adapters(lora, rngs=rngs)
    return nnx.split(model, functools.partial(is_trained, lora=lora), ...)


def is_trained(path: tuple, _: Any, *, lora: LoRAConfig | None) -> bool:
    """Whether a variable of a reward model is trained."""
    name = leaf_name(path)
    if name in ("offset", "gain"):
        return False
    return lora is None or "lora_" in name or name.startswith("score.")


def load(run: Run, pretrained: Pretrained) -> FrozenRewardModel:
    """The frozen reward model of a finished run, with its normalisation."""
    lora = lora_config(run.config["lora"])
    definition, trainable, frozen = initial(pretrained, run.config["seed"], lora)
    trainable = load_weights(run.checkpoints / "best", trainable)
    model = nnx.merge(definition, trainable, frozen)
    model.offset[...] = jnp.float32(run.summary["scale"]["offset"])
    model.gain[...] = jnp.float32(run.summary["scale"]["gain"])
    return FrozenRewardModel(*nnx.split(model))


def with_end(
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    end: int | tuple[int, ...],
    tail: tuple[int, ...] | None = (),
) -> tuple[Int[Array, "batch longer"], Bool[Array, "batch longer"]]:
    """Episodes as the reward model was trained to read them: every response ends.

    One that was cut off fills its row, so that the column added here is where its end belongs. Of
    several tokens that end a response, the reward model knows the first. The tail follows; where it
    is None, the end itself is left out.
    """
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    if tail is None:
        return tokens, mask & ~(last & ends_response(tokens, end))
    cut_off = mask[:, -1:] & ~ends_response(tokens[:, -1:], end)
    if isinstance(end, tuple):
        tokens = jnp.where(last & ends_response(tokens, end), end[0], tokens)
        end = end[0]
    columns = jnp.tile(jnp.asarray([(end, *tail)], tokens.dtype), (len(tokens), 1))
    after = jnp.ones((len(tokens), len(tail)), bool)
    return (
        jnp.concatenate([tokens, columns], axis=1),
        jnp.concatenate([mask, cut_off, after], axis=1),
    )


@functools.partial(jax.jit, static_argnames=("definition", "end"))
def response_rewards(
    state: nnx.State,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    responses: Responses,
    *,
    definition: nnx.GraphDef,
    end: int | tuple[int, ...],
) -> Float[Array, "batch"]:
    """Normalised reward of sampled responses, a few at a time; nothing is added or taken away."""
    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    model = nnx.merge(definition, state)
    rows = with_end(tokens, mask, end, model.tail)
    return in_parts(lambda rows: model(*rows), rows, whole_part(len(tokens), SCORED))


def scale_on_reference(
    model: FrozenRewardModel,
    pretrained: Pretrained,
    prompts: Sequence[Conversation],
    cfg: RewardConfig,
) -> dict[str, float]:
    """Centre and gain that give the pretrained policy's responses mean 0 and deviation 1 (N+).

    Raises:
      UserError: there are fewer than two responses, or all have the same reward.
    """
    check_references(prompts, cfg)
    tokenizer = pretrained.tokenizer
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=cfg.reference_prompt_tokens)
    numbers = filled(len(rows))
    keys = draw_keys(jax.random.key(cfg.seed), numbers)
    *batch, keys = over_devices((rows[numbers], masks[numbers], keys))
    responses = sample(
        sharded(pretrained.state, RULES), *batch, keys, 1.0,
        decoder_def=pretrained.definition, length=cfg.reference_response_tokens,
        end=tokenizer.ends, pad=tokenizer.pad,
    )  # fmt: skip
    raw = on_host(
        response_rewards(
            sharded(model.state, RULES),
            *batch,
            responses,
            definition=model.definition,
            end=tokenizer.ends,
        )  # fmt: skip
    )[: len(rows)]
    if not raw.std() > 1e-6:
        raise UserError(
            f"the rewards of {len(raw)} reference responses have no spread (mean {raw.mean():.3g}, "
            f"deviation {raw.std():.3g}): the reward model tells no responses apart; give it more "
            "pairs, or RewardConfig.reference_samples or reference_response_tokens a larger value"
        )
    return {"offset": float(raw.mean()), "gain": 1 / float(raw.std())}


def check_references(prompts: Sequence[Conversation], cfg: RewardConfig) -> None:
    """Stops where there are too few prompts for a deviation, before anything is trained.

    Raises:
      UserError: there are fewer than two.
    """
    if len(prompts) < 2:
        raise UserError(
            f"{len(prompts)} prompts for RewardConfig.reference_samples={cfg.reference_samples}: "
            "the scale of a reward needs two at least; give more prompts"
        )
