"""What held-out pairs say about a reward model.

Pairs come as columns of equal length: `post`, `domain` and `grade` (empty where there is none) are
labels, `chosen` and `rejected` raw scores, `chosen_tokens` and `rejected_tokens` lengths. What
predicts the preference of a pair is a difference, above zero where it agrees with people.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from sklearn import metrics

from rlhf_jax.intervals import bootstrap, bootstrap_weighted, by_group
from rlhf_jax.reward_model.bag_of_words import log_loss

Columns = Mapping[str, np.ndarray]
LENGTHS = ("under half as long", "shorter", "within 20 %", "longer", "over twice as long")
LENGTH_EDGES = (1 / 2, 1 / 1.2, 1.2, 2)  # of the ratio of chosen to rejected tokens
BINS = 10  # of the confidence, between 0.5 and 1
MISTAKES = 5
CLASSES = ("first preferred", "second preferred")
SCORES = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")


def assess(
    test: Columns,
    validation: Columns,
    baselines: Mapping[str, Float[np.ndarray, "pairs"]],
    flipped: Bool[np.ndarray, "pairs"],
) -> dict[str, Any]:
    """Everything that the report says about a reward model, intervals by post.

    Args:
      test: the held-out pairs.
      validation: the pairs on which the temperature is fitted.
      baselines: differences of other predictors on the test pairs, by name.
      flipped: pairs whose rejected reply is shown first, see `verdicts`.
    """
    difference = test["chosen"] - test["rejected"]
    found: dict[str, Any] = accuracies(difference, test)
    found["baselines"] = {
        name: accuracies(other, test) | {"gain": gain(difference, other, test["post"])}
        for name, other in baselines.items()
    }
    found["length_correlation"] = correlation(
        np.concatenate([test["chosen"], test["rejected"]]),
        np.concatenate([test["chosen_tokens"], test["rejected_tokens"]]),
    )
    found["verdicts"] = verdicts(difference, flipped, test["post"])
    temperature = fitted_temperature(validation["chosen"] - validation["rejected"])
    found["temperature"] = temperature
    found["calibration"] = {
        "before": calibration(difference, test["post"]),
        "after": calibration(difference / temperature, test["post"]),
    }
    found["mistakes"] = mistakes(difference / temperature, test)
    return found


def agreement(difference: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
    """1 where a difference orders a pair as people did, 0 where not, one half for a tie."""
    return (1 + np.sign(difference)) / 2


def gain(
    difference: Float[np.ndarray, "pairs"],
    other: Float[np.ndarray, "pairs"],
    clusters: Shaped[np.ndarray, "pairs"],
) -> dict[str, float]:
    """By how much one predictor is more accurate than another, pair by pair."""
    return bootstrap(agreement(difference) - agreement(other), clusters=clusters)._asdict()


def accuracies(difference: Float[np.ndarray, "pairs"], pairs: Columns) -> dict[str, Any]:
    """Accuracy on all pairs and on groups of them."""
    correct, clusters = agreement(difference), pairs["post"]
    ratio = pairs["chosen_tokens"] / pairs["rejected_tokens"]
    classes = np.asarray(LENGTHS)[np.digitize(ratio, LENGTH_EDGES)]
    by_length = by_group(correct, classes, clusters=clusters)
    found = {
        "accuracy": bootstrap(correct, clusters=clusters)._asdict(),
        "accuracy_by_domain": by_group(correct, pairs["domain"], clusters=clusters),
        "accuracy_by_length": {name: by_length[name] for name in LENGTHS if name in by_length},
    }
    if LENGTHS[2] in by_length:
        found["accuracy_alike"] = by_length[LENGTHS[2]]
    if any(pairs["grade"]):
        found["accuracy_by_grade"] = by_group(correct, pairs["grade"], clusters=clusters)
    return found


def coin(count: int, seed: int) -> Bool[np.ndarray, "pairs"]:
    """True for half of the pairs, drawn at random."""
    return np.random.default_rng([seed, count]).permutation(count) % 2 == 0


def verdicts(
    difference: Float[np.ndarray, "pairs"],
    flipped: Bool[np.ndarray, "pairs"],
    clusters: Shaped[np.ndarray, "pairs"],
) -> dict[str, Any]:
    """The model as a classifier that says which of two replies is preferred, first or second.

    Args:
      difference: score of chosen minus rejected reply.
      flipped: pairs shown with the rejected reply first, so that the second is the preferred one.
        Without them there would be one class, and a model that always said "first" would be right.
      clusters: the pairs' posts.

    Returns:
      confusion: counts, rows are the truth, columns the verdict, first before second.
      report: precision, recall, F1 and support of each class.
      auc: area under the ROC curve of "the first is preferred", by the score of first minus second.
    """
    shown, first = np.where(flipped, -difference, difference), ~flipped
    truth, verdict = np.where(first, *CLASSES), np.where(shown > 0, *CLASSES)
    scores = metrics.precision_recall_fscore_support(
        truth, verdict, labels=CLASSES, zero_division=0
    )
    report = [
        dict(zip(("class", "precision", "recall", "f1", "support"), row, strict=True))
        for row in zip(CLASSES, *scores, strict=True)
    ]
    confusion = metrics.confusion_matrix(truth, verdict, labels=CLASSES)
    auc = bootstrap_weighted(
        lambda weights: area_under_curve(shown, first, weights), clusters=clusters
    )
    return {"confusion": confusion, "report": report, "auc": auc._asdict()}


def roc_curve(
    scores: Float[np.ndarray, "items"], positive: Bool[np.ndarray, "items"]
) -> dict[str, Float[np.ndarray, "thresholds"]]:
    """Share of negatives and of positives above each threshold, from the highest score down.

    Without both classes it is the diagonal, of which half of the square lies below.
    """
    if positive.all() or not positive.any():
        return {name: np.array([0.0, 1.0]) for name in ("false_positive", "true_positive")}
    false_positive, true_positive, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
    return {"false_positive": false_positive, "true_positive": true_positive}


def area_under_curve(
    scores: Float[np.ndarray, "items"],
    positive: Bool[np.ndarray, "items"],
    weights: Float[np.ndarray, "items"],
) -> float:
    """Share of (positive, negative) couples of which the positive one scores higher.

    A tie counts as half (Mann and Whitney, 1947); where a class has no weight, as in some samples
    of the bootstrap, it is one half.
    """
    if not (weights[positive].any() and weights[~positive].any()):
        return 0.5
    return float(metrics.roc_auc_score(positive, scores, sample_weight=weights))


def fitted_temperature(difference: Float[np.ndarray, "pairs"]) -> float:
    """The T of highest likelihood in P(chosen is preferred) = sigmoid(difference / T).

    Guo et al. (2017). Looked for between a thousandth and a thousand times the spread of the
    differences, in steps of about one per cent; where these say nothing, the largest is best.
    """
    spread = float(difference.std()) or 1.0
    candidates = spread * np.geomspace(1e-3, 1e3, 1201)
    return float(min(candidates, key=lambda temperature: log_loss(difference / temperature)))


def calibration(
    log_odds: Float[np.ndarray, "pairs"], clusters: Shaped[np.ndarray, "pairs"]
) -> dict[str, Any]:
    """Confidence against accuracy.

    The confidence of a pair is the probability of the reply that the model prefers, between one
    half and 1.

    Returns:
      log_loss: nats per pair; log 2 is knowing nothing.
      error: expected calibration error, the mean distance of confidence and accuracy over bins
        of equal width, weighted by their pairs (Naeini et al., 2015).
      error_by_chance: what a perfectly calibrated model of these confidences would show on so
        few pairs, on average.
      bins: of each bin that is not empty, mean confidence, accuracy with its interval, count.
    """
    confidence, correct = 1 / (1 + np.exp(-np.abs(log_odds))), agreement(log_odds)
    edges = np.linspace(0.5, 1, BINS + 1)[1:-1]
    place = np.digitize(confidence, edges)

    def error(correct):
        return float(np.abs(np.bincount(place, correct - confidence)).sum() / len(correct))

    rng = np.random.default_rng(0)
    drawn = [error(rng.random(len(confidence)) < confidence) for _ in range(200)]
    bins = [
        {"confidence": float(confidence[place == k].mean())}
        | bootstrap(correct[place == k], clusters=clusters[place == k])._asdict()
        for k in np.unique(place)
    ]
    return {
        "log_loss": log_loss(log_odds),
        "error": error(correct),
        "error_by_chance": float(np.mean(drawn)),
        "bins": bins,
    }


def mistakes(log_odds: Float[np.ndarray, "pairs"], pairs: Columns) -> list[dict[str, Any]]:
    """The pairs on which the model was most sure of the wrong reply, one a post at most.

    `pair` is the number of the pair in the columns, `confidence` that in the wrong reply.
    """
    found: dict[str, dict[str, Any]] = {}
    for k in np.argsort(log_odds, kind="stable"):
        if log_odds[k] >= 0 or len(found) == MISTAKES:
            break
        row = {name: pairs[name][k] for name in ("post", "domain", *SCORES)}
        confidence = 1 / (1 + math.exp(log_odds[k]))
        found.setdefault(str(pairs["post"][k]), {"pair": k, "confidence": confidence, **row})
    return list(found.values())


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
