"""Episodes: responses to prompts, and what every model says of them before the update."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiment_runs.process import peak_memory_gb
from rlhf_jax import objectives
from rlhf_jax.config import PPOConfig
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.sampling import Responses, in_parts, sample
from rlhf_jax.ppo.actor_critic import Policy
from rlhf_jax.reward_model.model import with_end

REWARD_EDGES = np.linspace(-4, 4, 17)  # in deviations of the pretrained policy's rewards


class Static(NamedTuple):
    """What the compiled step knows in advance."""

    policy: nnx.GraphDef
    reference: nnx.GraphDef
    reward_models: tuple[tuple[str, float, nnx.GraphDef], ...]  # name, weight, static half
    optimizer: optax.GradientTransformation
    cfg: PPOConfig
    end: tuple[int, ...]  # tokens that end a response


class Frozen(NamedTuple):
    """Arrays that a step reads and never copies."""

    policy: nnx.State  # what the variant does not train
    reference: nnx.State  # with LoRA the same arrays as above: the tree with adapters off
    reward_models: dict[str, nnx.State]


class Episodes(NamedTuple):
    """A batch of prompts with responses; in the second group column t is response token t."""

    tokens: Int[Array, "batch time"]  # prompt, padded on the left, then response
    token_mask: Bool[Array, "batch time"]
    mask: Bool[Array, "batch response"]  # the end token counts
    logprobs: Float[Array, "batch response"]  # nats, of the policy that sampled
    reference_logprobs: Float[Array, "batch response"]
    entropy: Float[Array, "batch response"]  # nats
    kl: Float[Array, "batch response"]  # nats, exact, policy to reference
    values: Float[Array, "batch response"] | None  # the critic's, before the token
    terms: dict[str, Float[Array, "batch"]]  # of the reward, each times its weight

    @property
    def reward(self) -> Float[Array | np.ndarray, "batch"]:
        """The sum of the terms: of a reward model alone its normalised reward, nothing added."""
        return functools.reduce(operator.add, self.terms.values())


def draw(tuned: Policy, batch, keys: Array, cfg, tokenizer) -> Responses:
    """Responses to each prompt from the policy as it is, those to one prompt together."""
    definition, state = tuned.decoder()
    return sample(
        state, *batch, keys, cfg.temperature, decoder_def=definition,
        length=cfg.response_tokens, end=tokenizer.ends, pad=tokenizer.pad,
        samples=cfg.responses_per_prompt,
    )  # fmt: skip


def score(
    trainable, frozen, prompts, prompt_mask, responses, function_terms, *, static
) -> Episodes:
    """What policy, reference, critic and reward models say of the episodes, before any update.

    Works on `forward_batch` episodes at a time, so that activations of no more exist.
    `function_terms` are the terms of the reward that are known already.
    """
    cfg = static.cfg
    model = nnx.merge(static.policy, trainable, frozen.policy)
    reference = nnx.merge(static.reference, frozen.reference)
    reward_models = {
        name: (weight, nnx.merge(definition, frozen.reward_models[name]))
        for name, weight, definition in static.reward_models
    }
    width = prompts.shape[1]

    def some(part):
        tokens, token_mask, mask, from_functions = part
        states, values = model.states_and_values(tokens, token_mask, width)
        others = logprobs.response_states(reference, tokens, token_mask, width)
        compared = logprobs.compare(
            model.decoder, reference, states, others, tokens[:, width:], cfg.temperature
        )
        terms = {
            name: weight
            * reward_model(*with_end(tokens, token_mask, static.end, reward_model.tail))
            for name, (weight, reward_model) in reward_models.items()
        }
        return Episodes(tokens, token_mask, mask, *compared, values, {**terms, **from_functions})

    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    token_mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    return in_parts(some, (tokens, token_mask, responses.mask, function_terms), cfg.forward_batch)


def episode_metrics(episodes: Episodes, responses: Responses, returns, cut_off) -> dict[str, Array]:
    """What a batch of episodes looks like before the update; nats, rewards, tokens."""
    mask = episodes.mask
    k1 = objectives.kl_k1(episodes.logprobs, episodes.reference_logprobs)
    k3 = objectives.kl_k3(episodes.logprobs, episodes.reference_logprobs)
    # Sampled against recomputed: what the cache rounds otherwise.
    error = jnp.where(mask, jnp.abs(episodes.logprobs - responses.logprobs), jnp.nan)
    metrics = {
        "reward": episodes.reward.mean(),
        "reward_std": episodes.reward.std(),
        "kl": objectives.masked_mean(episodes.kl, mask),
        "kl_k1": objectives.masked_mean(k1, mask),
        "kl_k3": objectives.masked_mean(k3, mask),
        "kl_sequence": jnp.where(mask, episodes.kl, 0.0).sum(axis=1).mean(),
        "entropy": objectives.masked_mean(episodes.entropy, mask),
        "response_tokens": mask.sum(axis=1).mean(),
        "ended": 1 - cut_off.mean(),
        "logprob_error": jnp.nanmax(error),
        "logprob_error_mean": jnp.nanmean(error),
        "logprob_error_p99": jnp.nanquantile(error, 0.99),
    }
    if returns is not None:
        values = episodes.values
        metrics["explained_variance"] = objectives.explained_variance(values, returns, mask)
    if len(episodes.terms) > 1:
        metrics |= {f"reward_{name}": term.mean() for name, term in episodes.terms.items()}
    return metrics


def cost(episodes: Episodes, seconds_sampling: float, seconds_update: float) -> dict[str, float]:
    """What a step took: sampled tokens in the first phase, prompts as well in the second."""
    sampled, read = int(episodes.mask.sum()), int(episodes.token_mask.sum())
    return {
        "seconds_sampling": seconds_sampling,
        "seconds_update": seconds_update,
        "tokens": sampled,
        "sampled_tokens_per_second": sampled / seconds_sampling,
        "updated_tokens_per_second": read / seconds_update,
        "peak_memory_gb": peak_memory_gb(),
    }


def histogram(reward: Float[Array | np.ndarray, "batch"]) -> list[int]:
    """Episodes in each class of `REWARD_EDGES`; what lies outside counts with the outermost."""
    return np.histogram(np.clip(reward, REWARD_EDGES[0], REWARD_EDGES[-1]), REWARD_EDGES)[
        0
    ].tolist()
