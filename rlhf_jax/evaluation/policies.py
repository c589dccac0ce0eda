"""Reward of the pretrained and the tuned policies on prompts that nobody trained on."""

import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from experiment_runs.process import progress
from experiment_runs.run import Run
from rlhf_jax.config import EvaluationConfig, PPOConfig
from rlhf_jax.evaluation.response_statistics import Columns, describe, gain
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.sampling import Responses
from rlhf_jax.ppo.rewards import Term, function_rewards, functions_of, models_of, reward_terms
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.prompt_rows import cut_texts, prompt_rows
from rlhf_jax.pretrained.responses import respond, response_texts
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model.model import FrozenRewardModel, response_rewards

BASE = "pretrained"
RATED = (BASE, "ppo-full", "ppo-lora")  # policies whose responses are rated by hand
Decoders = Mapping[str, tuple[nnx.GraphDef, nnx.State]]  # a policy's name to its decoder


def evaluate(
    run: Run,
    cfg: EvaluationConfig,
    lengths: PPOConfig,
    pretrained: Pretrained,
    reward_models: Mapping[str, FrozenRewardModel],
    tuned: Decoders,
    prompts: Sequence[str],
) -> None:
    """Samples every policy's responses with the same random draws, scores and compares them.

    Args:
      run: where to write.
      cfg: the configuration.
      lengths: gives the lengths of prompts and responses that the policies were trained with.
      pretrained: the policy that the tuned ones are compared with.
      reward_models: "reward", the frozen one that the policies were tuned against, and
        "second_reward", trained on other posts, that no policy was tuned against.
      tuned: the tuned policies.
      prompts: unseen ones.
    """
    decoders = {BASE: (pretrained.definition, pretrained.state), **tuned}
    rewards = reward_terms({name: (model, 1.0) for name, model in reward_models.items()})
    columns, texts = answered(decoders, pretrained.tokenizer, rewards, prompts, cfg, lengths)
    run.rewind(-1)  # what an attempt that was cut off has left
    read = cut_texts(prompts, pretrained.tokenizer, length=lengths.prompt_tokens)
    keep_responses(run, prompts, read, texts, columns, cfg)
    run.save_arrays(
        **{f"{name}.{key}": value for name, own in columns.items() for key, value in own.items()}
    )
    run.finish(
        policies={
            name: describe(columns[name], texts[name], cfg, rewards=[*reward_models])
            for name in decoders
        },
        gains={name: gain(columns[name], columns[BASE], cfg) for name in tuned},
        variants={name: gain(own, columns[BASE], cfg) for name, own in over_seeds(columns).items()},
        prompts=len(prompts),
        prompts_cut=sum(map(bool, read)),
    )


def answered(
    decoders: Decoders,
    tokenizer: Tokenizer,
    rewards: Mapping[str, Term],
    prompts: Sequence[str],
    cfg: EvaluationConfig,
    lengths: PPOConfig,
) -> tuple[dict[str, Columns], dict[str, list[str]]]:
    """Every model's responses as text, and what is measured of each.

    Args:
      decoders: the first one is what the KL is measured to.
      tokenizer: of all of them.
      rewards: become columns of their names, beside "kl" (nats a response), "tokens" and "ended".
      prompts: unseen ones.
      cfg: the configuration.
      lengths: gives the lengths of prompts and, where `cfg` names none, of responses.
    """
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=lengths.prompt_tokens)
    reference = next(iter(decoders.values()))
    columns: dict[str, dict[str, np.ndarray]] = {}
    texts: dict[str, list[str]] = {}
    starts = range(0, len(prompts), cfg.batch)
    bar = progress(label="evaluation", total=len(decoders) * len(starts))
    for name, decoder in decoders.items():
        parts, texts[name] = [], []
        for start in starts:
            batch = rows[start : start + cfg.batch], masks[start : start + cfg.batch]
            responses = respond(
                decoder, *batch, tokenizer, length=cfg.response_tokens or lengths.response_tokens,
                temperature=cfg.temperature, seed=cfg.seed, first=start,
            )  # fmt: skip
            tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
            some = response_texts(responses, tokenizer)
            texts[name] += some
            ended = (np.isin(tokens, tokenizer.ends) & mask).any(axis=1)
            kl = sequence_kl(
                decoder[1], reference[1], *batch, responses, cfg.temperature,
                definitions=(decoder[0], reference[0]),
            )  # fmt: skip
            parts.append(
                model_rewards(rewards, batch, responses, tokenizer.ends)
                | function_rewards(functions_of(rewards), prompts[start : start + cfg.batch], some)
                | {"kl": kl, "tokens": mask.sum(axis=1), "ended": ended}
            )
            bar.update()
        columns[name] = {
            column: np.concatenate([np.asarray(part[column]) for part in parts])
            for column in parts[0]
        }
    bar.close()
    return columns, texts


def over_seeds(columns: Mapping[str, Columns]) -> dict[str, Columns]:
    """Means over the runs of a variant with different seeds, prompt by prompt.

    The run "ppo-full-1" repeats "ppo-full"; a variant with one run has no mean.
    """
    variants: dict[str, list[Columns]] = {}
    for name, own in columns.items():
        variants.setdefault(re.sub(r"-\d+$", "", name), []).append(own)
    return {
        name: {column: np.mean([own[column] for own in runs], axis=0) for column in runs[0]}
        for name, runs in variants.items()
        if len(runs) > 1
    }


def model_rewards(
    rewards: Mapping[str, Term],
    batch: tuple[np.ndarray, np.ndarray],
    responses: Responses,
    end: tuple[int, ...],
) -> dict[str, Float[Array, "batch"]]:
    """Every reward model's reward of the responses to a batch of prompts."""
    return {
        name: response_rewards(
            term.source.state, *batch, responses, definition=term.source.definition, end=end
        )
        for name, term in models_of(rewards).items()
    }


def keep_responses(run, prompts, read, texts, columns, cfg: EvaluationConfig) -> None:
    """Every response with its reward. Those to the first prompts that were read whole are for
    rating by hand; to prompts that were cut only where there are too few others."""
    rated = sorted(range(len(prompts)), key=lambda i: bool(read[i]))[: cfg.rated_prompts]
    for name in texts:
        for i, prompt in enumerate(prompts):
            run.sample(
                step=0, prompt_id=i, model=name, prompt=prompt, response=texts[name][i],
                reward=float(columns[name]["reward"][i]),
                read=read[i],  # the beginning that was read, where the prompt was cut
                rated=i in rated and name in RATED,
            )  # fmt: skip


@functools.partial(jax.jit, static_argnames="definitions")
def sequence_kl(
    state: nnx.State,
    reference_state: nnx.State,
    prompts: Array,
    prompt_mask: Array,
    responses,
    temperature: float | Float[Array, ""],
    *,
    definitions: tuple[nnx.GraphDef, nnx.GraphDef],
) -> Float[Array, "batch"]:
    """Exact KL to the reference summed over each response, nats."""
    decoder = nnx.merge(definitions[0], state)
    reference = nnx.merge(definitions[1], reference_state)
    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    width = prompts.shape[1]
    states = logprobs.response_states(decoder, tokens, mask, width)
    others = logprobs.response_states(reference, tokens, mask, width)
    *_, kl = logprobs.compare(decoder, reference, states, others, responses.tokens, temperature)
    return jnp.where(responses.mask, kl, 0.0).sum(axis=1)
