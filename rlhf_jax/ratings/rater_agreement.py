"""What ratings say of the models, and how raters agree with each other and the reward model."""

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from sklearn.metrics import cohen_kappa_score

from rlhf_jax.ratings.store import (
    CRITERIA,
    Rating,
    Response,
    label,
    mean,
    rating_table,
    response_hash,
)

CHANCE = 0.05  # a sign test that cannot fall below this can show nothing

Scored = list[tuple[Response, float]]  # rated responses with the mean of their ratings


def rater_agreement(ratings: Sequence[Rating]) -> pd.DataFrame:
    """Quadratically weighted kappa (Cohen, 1968) of every two raters, on what both have rated.

    It is 1 for equal scores and 0 for no more agreement than by chance; where both gave one and the
    same score throughout, it is undefined and missing.
    """
    scores: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
    for rating in ratings:
        scores[rating.rater][rating.response_hash] = [getattr(rating, c) for c in CRITERIA]
    rows = []
    for pair in itertools.combinations(sorted(scores), 2):
        both = sorted(set.intersection(*(set(scores[rater]) for rater in pair)))
        one, other = (
            np.array([scores[rater][key] for key in both], int).reshape(-1, len(CRITERIA))
            for rater in pair
        )
        kappas = {label(c): weighted_kappa(one[:, i], other[:, i]) for i, c in enumerate(CRITERIA)}
        kappas["all criteria"] = weighted_kappa(one.ravel(), other.ravel())
        rows.append({"raters": ", ".join(pair), "responses": len(both), **kappas})
    return pd.DataFrame(rows)


def weighted_kappa(one: Int[np.ndarray, "items"], other: Int[np.ndarray, "items"]) -> float:
    """Quadratically weighted kappa of two lists of scores from 1 to 5."""
    if len({*one, *other}) < 2:
        return np.nan
    return float(cohen_kappa_score(one, other, labels=[1, 2, 3, 4, 5], weights="quadratic"))


def reading(responses: Sequence[Response], ratings: Sequence[Rating]) -> str:
    """What the ratings say of the models, and what so few cannot say; the first is the baseline."""
    scored = mean_scores(responses, ratings)
    if not scored:
        return "Before responses are rated there is nothing to compare."
    table = rating_table(responses, ratings)
    sentences = (
        model_means(table),
        widest_criterion(table),
        against_baseline(scored),
        reward_order(scored),
    )
    return " ".join(filter(None, sentences))


def mean_scores(responses: Sequence[Response], ratings: Sequence[Rating]) -> Scored:
    """The responses that are rated, with the mean over their raters and all criteria."""
    given = collections.defaultdict(list)
    for rating in ratings:
        given[rating.response_hash] += [getattr(rating, c) for c in CRITERIA]
    keys = [response_hash(row["prompt"], row["response"]) for row in responses]
    return [(row, mean(given[k])) for k, row in zip(keys, responses, strict=True) if k in given]


def by_model(given: Iterable[tuple[Response, Any]]) -> dict[str, dict[int, Any]]:
    """What was given to responses, such as a mean rating, by model and prompt."""
    found: dict[str, dict[int, Any]] = {}
    for row, value in given:
        found.setdefault(row["model"], {})[row["prompt_id"]] = value
    return found


def model_means(table: pd.DataFrame) -> str:
    """The mean rating of each model over criteria and rated responses."""
    means = table.set_index("model")["mean"].dropna()
    return (
        f"Means over all criteria: {'; '.join(f'{x:.2f} for {name}' for name, x in means.items())}."
    )


def widest_criterion(table: pd.DataFrame) -> str:
    """The criterion in which the models' means lie farthest apart."""
    means = table.set_index("model")[[label(c) for c in CRITERIA]].dropna()
    spread = means.max() - means.min()
    if not spread.max() > 0:
        return ""
    name = spread.idxmax()
    low, high = means[name].idxmin(), means[name].idxmax()
    return (
        f"The models lie farthest apart in {name}: {means[name][low]:.1f} ({low}) to "
        f"{means[name][high]:.1f} ({high})."
    )


def against_baseline(scored: Scored) -> str:
    """On how many prompts each model was rated above and below the first one."""
    (base, own), *others = by_model(scored).items()
    sentences = []
    for name, scores in others:
        signs = np.sign([scores[prompt] - own[prompt] for prompt in scores if prompt in own])
        above, below = (signs > 0).sum(), (signs < 0).sum()
        sentences.append(f"{name} is rated above {base} on {above} and below on {below}")
    if not sentences:
        return ""
    prompts = len(own)
    text = f"Of {prompts} prompt{'s' * (prompts > 1)}, {'; '.join(sentences)}."
    if (chance := coin(prompts)) > CHANCE:
        text += (
            f" All {prompts} on one side would happen to a fair coin in {chance:.0%} of cases: "
            "these numbers describe these responses and rank no model."
        )
    return text


def coin(prompts: int) -> float:
    """How probable it is that a fair coin falls on one side for all of so many prompts."""
    return min(1.0, 2 * 0.5**prompts)


def reward_order(scored: Scored) -> str:
    """How often the reward model orders two responses to one prompt as the raters do."""
    same = differing = 0
    for (one, score), (other, score_of_other) in itertools.combinations(scored, 2):
        product = (score - score_of_other) * (one["reward"] - other["reward"])
        if one["prompt_id"] == other["prompt_id"] and product:
            differing += 1
            same += product > 0
    if not differing:
        return "No two responses to one prompt differ in both rating and reward."
    return (
        f"Of {differing} pairs of responses to one prompt, ties aside, the reward model orders "
        f"{same} as the raters do; chance would be half."
    )
