"""What the responses of one policy are like, and how two policies differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from rlhf_jax.config import EvaluationConfig
from rlhf_jax.intervals import Interval, bootstrap, bootstrap_crossed

STRATA = 5  # classes of length
LOOPED_RESAMPLES = 2000  # at most, of statistics that are no means: a Python loop draws them

MEASURED = ("kl", "surprise", "tokens", "ended")  # of every response, beside the rewards
DESCRIBED = (
    "kl_per_token", "kl_per_sequence", "perplexity", "tokens", "ended", "empty", "distinct_1",
    "distinct_2", "repetition",
)  # fmt: skip

# "reward", "second_reward" and what is `MEASURED`
Columns = Mapping[str, Shaped[np.ndarray, "prompts samples"]]
Clusters = Shaped[np.ndarray, "prompts"]  # prompts of equal label are drawn together


def describe(
    columns: Columns,
    texts: Sequence[str],
    clusters: Clusters,
    cfg: EvaluationConfig,
    *,
    rewards: Sequence[str],
) -> dict[str, object]:
    """One policy: reward, distance from the reference, and what its responses look like."""
    tokens = columns["tokens"].sum()
    means = {name: columns[name].mean(axis=1) for name in rewards}
    return intervals(means, clusters, cfg) | {
        "kl_per_token": float(columns["kl"].sum() / tokens),
        "kl_per_sequence": float(columns["kl"].mean()),
        "perplexity": float(np.exp(columns["surprise"].sum() / tokens)),
        "tokens": float(columns["tokens"].mean()),
        "ended": float(columns["ended"].mean()),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": float(np.mean([repeated(text) for text in texts])),
    }


def gain(
    columns: Columns, base: Columns, clusters: Clusters, cfg: EvaluationConfig
) -> dict[str, object]:
    """A tuned policy against the pretrained one, prompt by prompt.

    A prompt is won by the policy whose responses to it have the higher mean reward.
    """
    options = {"clusters": clusters, "resamples": cfg.resamples, "seed": cfg.seed}
    changes = {name: columns[name].mean(axis=1) - base[name].mean(axis=1) for name in COMPARED}
    rewards, tokens = (
        np.stack([columns[name], base[name]]).astype(np.float64) for name in ("reward", "tokens")
    )
    return {
        **intervals(changes, clusters, cfg),
        **tally(changes["reward"]),
        "length_controlled": paired(length_controlled_gain, rewards, tokens, **options)._asdict(),
        "stratified": paired(stratified_gain, rewards, tokens, **options)._asdict(),
    }


COMPARED = ("reward", "second_reward", "tokens")


def intervals(
    values: Mapping[str, Float[np.ndarray, "prompts"]], clusters: Clusters, cfg: EvaluationConfig
) -> dict[str, dict[str, float]]:
    """Means over the prompts, each with its interval."""
    options = {"clusters": clusters, "resamples": cfg.resamples, "seed": cfg.seed}
    return {name: bootstrap(own, **options)._asdict() for name, own in values.items()}


def tally(changes: Float[np.ndarray, "prompts"]) -> dict[str, int]:
    """How many prompts were won, tied and lost."""
    signs = {"wins": changes > 0, "ties": changes == 0, "losses": changes < 0}
    return {name: int(prompts.sum()) for name, prompts in signs.items()}


def gain_over_seeds(
    runs: Sequence[Columns], base: Columns, clusters: Clusters, cfg: EvaluationConfig
) -> dict[str, object]:
    """The gain of a variant that was trained with several seeds, all of them on the same prompts.

    The intervals say what other prompts and other seeds could have given.
    """
    options = {"clusters": clusters, "resamples": cfg.resamples, "seed": cfg.seed}
    changes = {
        name: np.stack([own[name].mean(axis=1) for own in runs]) - base[name].mean(axis=1)
        for name in COMPARED
    }
    found = {name: bootstrap_crossed(own, **options)._asdict() for name, own in changes.items()}
    return found | tally(changes["reward"].mean(axis=0)) | {"seeds": len(runs)}


def paired(
    statistic,
    rewards: Float[np.ndarray, "2 prompts samples"],
    tokens: Float[np.ndarray, "2 prompts samples"],
    *,
    clusters: Clusters,
    resamples: int,
    seed: int,
) -> Interval:
    """A statistic of two policies' responses with its interval, prompts drawn with replacement."""
    rng, labels = np.random.default_rng(seed), np.unique(clusters, return_inverse=True)[1]
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]

    def of(prompts: Any) -> float:
        return statistic(rewards[:, prompts].reshape(2, -1), tokens[:, prompts].reshape(2, -1))

    found = []
    for _ in range(min(resamples, LOOPED_RESAMPLES)):
        drawn = rng.integers(0, len(members), len(members))
        found.append(of(np.concatenate([members[label] for label in drawn])))
    comparable = [value for value in found if not np.isnan(value)] or [np.nan]
    low, high = np.percentile(comparable, [2.5, 97.5])
    return Interval(of(slice(None)), float(low), float(high), rewards.shape[1])


def length_controlled_gain(
    rewards: Float[np.ndarray, "2 responses"], tokens: Float[np.ndarray, "2 responses"]
) -> float:
    """Gain between responses of equal length, if reward is linear in length within a policy.

    The slope is that of least squares with an intercept for each policy; it is 0 where the lengths
    do not vary within the policies.

    Args:
      rewards: of the tuned policy and of the one that it is compared with.
      tokens: lengths of the same responses.
    """
    inner = tokens - tokens.mean(axis=1, keepdims=True)
    varies = (inner**2).sum()
    slope = (inner * rewards).sum() / varies if varies else 0.0
    (reward, base), (length, base_length) = rewards.mean(axis=1), tokens.mean(axis=1)
    return float(reward - base - slope * (length - base_length))


def stratified_gain(
    rewards: Float[np.ndarray, "2 responses"], tokens: Float[np.ndarray, "2 responses"]
) -> float:
    """Gain within classes of like length, weighted by the responses in each (Singhal et al., 2023).

    The classes are fifths of all lengths; one that holds responses of only one policy cannot be
    compared and is left out. Not a number where all are.

    Args:
      rewards: of the tuned policy and of the one that it is compared with.
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
