"""What the words of the replies alone say about which one was preferred."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf_jax.reward_model.encoding import EncodedPost

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # scikit-learn's C


def bag_of_words(parts: Mapping[str, Sequence[EncodedPost]]) -> tuple[np.ndarray, float]:
    """Logistic regression on the words of the chosen and of the rejected reply.

    A feature is the difference of the two replies in log(1 + count) of a token. It sees neither the
    question nor the order of the words, and has no constant: which reply comes first says nothing.
    Tokens of a single training reply are left out.

    Args:
      parts: encoded "train", "validation" and "test" posts. The L2 penalty is that of the lowest
        loss on the validation pairs.

    Returns:
      The log-odds of every test pair that its chosen reply is the preferred one, in the order of
      the posts, and the inverse penalty.
    """
    replies = {
        name: [
            [post.replies[pair[place]][:-1] for post in posts for pair in post.pairs]
            for place in (0, 1)
        ]
        for name, posts in parts.items()
    }
    counter = CountVectorizer(analyzer=tuple, min_df=2, dtype=np.float64)
    counter.fit(replies["train"][0] + replies["train"][1])
    features = {
        name: counter.transform(chosen).log1p() - counter.transform(rejected).log1p()
        for name, (chosen, rejected) in replies.items()
    }
    # Both classes must occur: every second pair is turned around, which changes no loss.
    sign = np.where(np.arange(features["train"].shape[0]) % 2, -1.0, 1.0)
    turned = features["train"].multiply(sign[:, None]).tocsr()
    fits = [
        LogisticRegression(C=inverse, fit_intercept=False, max_iter=5000).fit(turned, sign)
        for inverse in INVERSE_PENALTIES
    ]
    best = min(fits, key=lambda fit: log_loss(features["validation"] @ fit.coef_[0]))
    return features["test"] @ best.coef_[0], best.C


def log_loss(log_odds: np.ndarray) -> float:
    """Mean negative log-likelihood of the preferred replies, nats per pair."""
    return float(np.logaddexp(0, -log_odds).mean())
