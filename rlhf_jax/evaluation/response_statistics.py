"""What the responses of one policy are like, and how two policies differ."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from rlhf_jax.config import EvaluationConfig
from rlhf_jax.intervals import Interval, bootstrap

STRATA = 5  # classes of length

Columns = Mapping[
    str, np.ndarray
]  # "reward", "second_reward", "kl", "tokens", "ended" of every response


def describe(
    columns: Columns, texts: Sequence[str], cfg: EvaluationConfig, *, rewards: Sequence[str]
) -> dict[str, object]:
    """One policy: reward, distance from the reference, and what its responses look like."""
    intervals = {
        name: bootstrap(columns[name], resamples=cfg.resamples, seed=cfg.seed).asdict()
        for name in rewards
    }
    return intervals | {
        "kl_per_token": float(columns["kl"].sum() / columns["tokens"].sum()),
        "kl_per_sequence": float(columns["kl"].mean()),
        "tokens": float(columns["tokens"].mean()),
        "ended": float(columns["ended"].mean()),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repeated(text) for text in texts])),
    }


def gain(columns: Columns, base: Columns, cfg: EvaluationConfig) -> dict[str, object]:
    """A tuned policy against the pretrained one, prompt by prompt."""
    options = {"resamples": cfg.resamples, "seed": cfg.seed}
    rewards = np.stack([columns["reward"], base["reward"]])
    tokens = np.stack([columns["tokens"], base["tokens"]]).astype(np.float64)
    difference = rewards[0] - rewards[1]
    return {
        "reward": bootstrap(difference, **options).asdict(),
        "second_reward": bootstrap(
            columns["second_reward"] - base["second_reward"], **options
        ).asdict(),
        "wins": int((difference > 0).sum()),
        "ties": int((difference == 0).sum()),
        "losses": int((difference < 0).sum()),
        "tokens": bootstrap(tokens[0] - tokens[1], **options).asdict(),
        "length_controlled": paired(length_controlled_gain, rewards, tokens, **options).asdict(),
        "stratified": paired(stratified_gain, rewards, tokens, **options).asdict(),
    }


def paired(statistic, rewards, tokens, *, resamples: int, seed: int) -> Interval:
    """A statistic of two policies' responses with its interval, prompts drawn with replacement."""
    rng, prompts = np.random.default_rng(seed), rewards.shape[1]
    found = []
    for _ in range(min(resamples, 2000)):  # in a Python loop: fewer than for means
        drawn = rng.integers(0, prompts, prompts)
        found.append(statistic(rewards[:, drawn], tokens[:, drawn]))
    comparable = [value for value in found if not np.isnan(value)] or [np.nan]
    low, high = np.percentile(comparable, [2.5, 97.5])
    return Interval(statistic(rewards, tokens), float(low), float(high), prompts)


def length_controlled_gain(
    rewards: Float[np.ndarray, "2 prompts"], tokens: Float[np.ndarray, "2 prompts"]
) -> float:
    """Gain between responses of equal length, if reward is linear in length within a policy.

    The slope is that of least squares with an intercept for each policy; it is 0 where the lengths
    do not vary within the policies.

    Args:
      rewards: of the tuned policy and of the one that it is compared with, prompt by prompt.
      tokens: lengths of the same responses.
    """
    inner = tokens - tokens.mean(axis=1, keepdims=True)
    varies = (inner**2).sum()
    slope = (inner * rewards).sum() / varies if varies else 0.0
    (reward, base), (length, base_length) = rewards.mean(axis=1), tokens.mean(axis=1)
    return float(reward - base - slope * (length - base_length))


def stratified_gain(
    rewards: Float[np.ndarray, "2 prompts"], tokens: Float[np.ndarray, "2 prompts"]
) -> float:
    """Gain within classes of like length, weighted by the responses in each (Singhal et al., 2023).

    The classes are fifths of all lengths; one that holds responses of only one policy cannot be
    compared and is left out. Not a number where all are.

    Args:
      rewards: of the tuned policy and of the one that it is compared with, prompt by prompt.
      tokens: lengths of the same responses.
    """
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, STRATA + 1)[1:-1]))
    stratum = np.searchsorted(edges, tokens, side="left")
    gains, weights = [], []
    for number in range(len(edges) + 1):
        own, other = rewards[0][stratum[0] == number], rewards[1][stratum[1] == number]
        if len(own) and len(other):
            gains.append(own.mean() - other.mean())
            weights.append(len(own) + len(other))
    return float(np.average(gains, weights=weights)) if gains else float("nan")


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
