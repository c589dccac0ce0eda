"""What held-out pairs say about a reward model."""

import math

import numpy as np

from rlhf_jax.statistics import bootstrap, by_group


def evidence(scored: dict[str, np.ndarray]) -> dict[str, object]:
    """Accuracy on held-out pairs with intervals by post, and what length alone achieves."""
    difference = scored["chosen"] - scored["rejected"]
    correct = (1 + np.sign(difference)) / 2
    longer = (1 + np.sign(scored["chosen_tokens"] - scored["rejected_tokens"])) / 2
    ratio = scored["chosen_tokens"] / scored["rejected_tokens"]
    alike = np.abs(np.log(ratio)) < math.log(1.2)  # within 20 %
    clusters = scored["post"]
    found: dict[str, object] = {
        "accuracy": bootstrap(correct, clusters=clusters).asdict(),
        "longer_wins": bootstrap(longer, clusters=clusters).asdict(),
        "accuracy_by_domain": by_group(correct, scored["domain"], clusters=clusters),
        "length_correlation": correlation(
            np.concatenate([scored["chosen"], scored["rejected"]]),
            np.concatenate([scored["chosen_tokens"], scored["rejected_tokens"]]),
        ),
    }
    if alike.sum() > 1:
        found["accuracy_alike"] = bootstrap(correct[alike], clusters=clusters[alike]).asdict()
    if any(scored["grade"]):
        found["accuracy_by_grade"] = by_group(correct, scored["grade"], clusters=clusters)
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
