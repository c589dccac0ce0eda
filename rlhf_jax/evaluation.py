"""Reward of the pretrained and the tuned policies on prompts that nobody trained on."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from reporting.runs import Run, progress
from rlhf_jax import policy
from rlhf_jax.batch import prompt_rows
from rlhf_jax.config import EvaluationConfig, PPOConfig
from rlhf_jax.generation import sample
from rlhf_jax.judge import Judge, response_rewards
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.statistics import bootstrap

BASE = "pretrained"
Decoders = Mapping[str, tuple[nnx.GraphDef, nnx.State]]  # a policy's name to its decoder


def evaluate(
    run: Run,
    cfg: EvaluationConfig,
    lengths: PPOConfig,
    pretrained: Pretrained,
    judge: Judge,
    tuned: Decoders,
    prompts: Sequence[str],
) -> None:
    """Samples every policy's responses with the same random draws, scores and compares them.

    Args:
      run: where to write.
      cfg: the configuration.
      lengths: gives the lengths of prompts and responses that the policies were trained with.
      pretrained: the policy that the tuned ones are compared with.
      judge: the frozen reward model.
      tuned: the tuned policies.
      prompts: unseen ones.
    """
    tokenizer = pretrained.tokenizer
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=lengths.prompt_tokens)
    decoders = {BASE: (pretrained.definition, pretrained.state), **tuned}
    columns: dict[str, dict[str, np.ndarray]] = {}
    texts: dict[str, list[str]] = {}
    starts = range(0, len(prompts), cfg.batch)
    bar = progress(label="evaluation", total=len(decoders) * len(starts))
    for name, (definition, state) in decoders.items():
        parts, texts[name] = [], []
        for start in starts:
            batch = rows[start : start + cfg.batch], masks[start : start + cfg.batch]
            responses = sample(
                state, *batch, jax.random.fold_in(jax.random.key(cfg.seed), start),
                cfg.temperature, decoder_def=definition, length=lengths.response_tokens,
                end=tokenizer.end, pad=tokenizer.pad,
            )  # fmt: skip
            tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
            texts[name] += [tokenizer.decode(t[m]) for t, m in zip(tokens, mask, strict=True)]
            reward = response_rewards(
                judge.state, *batch, responses, definition=judge.definition, end=tokenizer.end
            )
            kl = sequence_kl(
                state, pretrained.state, *batch, responses, lengths.temperature,
                definitions=(definition, pretrained.definition),
            )  # fmt: skip
            ended = ((tokens == tokenizer.end) & mask).any(axis=1)
            parts.append((np.asarray(reward), np.asarray(kl), mask.sum(axis=1), ended))
            bar.update()
        names = ("reward", "kl", "tokens", "ended")
        columns[name] = dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    bar.close()
    for name in decoders:
        for i, prompt in enumerate(prompts):
            run.sample(
                step=0, prompt_id=i, model=name, prompt=prompt, response=texts[name][i],
                reward=float(columns[name]["reward"][i]), rated=i < cfg.rated_prompts,
            )  # fmt: skip
    run.save_arrays(
        **{f"{name}.{key}": value for name, own in columns.items() for key, value in own.items()}
    )
    run.finish(
        policies={name: describe(columns[name], texts[name], cfg) for name in decoders},
        gains={name: gain(columns[name], columns[BASE], cfg) for name in tuned},
        prompts=len(prompts),
    )


@functools.partial(jax.jit, static_argnames="definitions")
def sequence_kl(
    state: nnx.State,
    reference_state: nnx.State,
    prompts: Array,
    prompt_mask: Array,
    responses,
    temperature: float,
    *,
    definitions: tuple[nnx.GraphDef, nnx.GraphDef],
) -> Float[Array, "batch"]:
    """Exact KL to the reference summed over each response, nats."""
    decoder = nnx.merge(definitions[0], state)
    reference = nnx.merge(definitions[1], reference_state)
    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    width = prompts.shape[1]
    states = policy.response_states(decoder, tokens, mask, width)
    others = policy.response_states(reference, tokens, mask, width)
    *_, kl = policy.compare(decoder, reference, states, others, responses.tokens, temperature)
    return jnp.where(responses.mask, kl, 0.0).sum(axis=1)


def describe(
    columns: Mapping[str, np.ndarray], texts: Sequence[str], cfg: EvaluationConfig
) -> dict[str, object]:
    """One policy: reward, distance from the reference, and what its responses look like."""
    return {
        "reward": bootstrap(columns["reward"], resamples=cfg.resamples, seed=cfg.seed).asdict(),
        "kl_per_token": float(columns["kl"].sum() / columns["tokens"].sum()),
        "kl_per_sequence": float(columns["kl"].mean()),
        "tokens": float(columns["tokens"].mean()),
        "ended": float(columns["ended"].mean()),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repeated(text) for text in texts])),
    }


def gain(
    columns: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], cfg: EvaluationConfig
) -> dict[str, object]:
    """A tuned policy against the pretrained one, prompt by prompt."""
    difference = columns["reward"] - base["reward"]
    return {
        "reward": bootstrap(difference, resamples=cfg.resamples, seed=cfg.seed).asdict(),
        "wins": int((difference > 0).sum()),
        "ties": int((difference == 0).sum()),
        "losses": int((difference < 0).sum()),
        "tokens": float((columns["tokens"] - base["tokens"]).mean()),
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all (Li et al., 2016)."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def repeated(text: str) -> float:
    """Share of a text's word 4-grams that occurred in it before."""
    grams = ngrams(text, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))
