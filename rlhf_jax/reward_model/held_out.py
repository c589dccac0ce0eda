"""A trained reward model on held-out pairs: what is kept as arrays and texts, and the summary."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiment_runs.run import Run
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model.assessment import assess, coin, roc_curve
from rlhf_jax.reward_model.bag_of_words import bag_of_words
from rlhf_jax.reward_model.encoding import EncodedPost

Scores = Mapping[str, np.ndarray]


def assess_and_keep(
    run: Run,
    posts: Mapping[str, Sequence[EncodedPost]],
    scored: Mapping[str, Scores],
    untrained: Scores,
    tokenizer: Tokenizer,
    *,
    seed: int,
) -> dict[str, Any]:
    """Keeps scores as arrays and the worst mistakes as text; the results for the summary.

    Args:
      run: where to keep them.
      posts: encoded "train", "validation" and "test" posts.
      scored: raw scores, chosen and rejected, of the "validation" and "test" pairs in the order of
        the posts.
      untrained: the same of the test pairs before the training.
      tokenizer: of the model.
      seed: for the order in which the two replies of a pair are shown.
    """
    validation, test = (pair_labels(posts[name]) | scored[name] for name in ("validation", "test"))
    words, inverse_penalty = bag_of_words(posts)
    baselines = {
        "longer": (test["chosen_tokens"] - test["rejected_tokens"]).astype(float),
        "bag_of_words": words,
        "untrained": untrained["chosen"] - untrained["rejected"],
    }
    flipped = coin(len(words), seed)
    shown = np.where(flipped, -1, 1) * (test["chosen"] - test["rejected"])
    run.save_arrays("validation_pairs", **validation)
    run.save_arrays("test_pairs", **test, **baselines, flipped=flipped)
    run.save_arrays("roc", **roc_curve(shown, ~flipped))
    found = assess(test, validation, baselines, flipped)
    found["bag_of_words_inverse_penalty"] = inverse_penalty
    step = len(run.metrics()) + 1  # beyond the last, so that a resumed run drops what it kept
    for mistake in found["mistakes"]:
        texts = pair_texts(*pairs_of(posts["test"])[mistake["pair"]], tokenizer)
        run.sample(step=step, mistake=mistake["pair"], **texts)
    return found


def pairs_of(posts: Sequence[EncodedPost]) -> list[tuple[EncodedPost, int]]:
    """Every pair as its post and its number there."""
    return [(post, i) for post in posts for i in range(len(post.pairs))]


def pair_labels(posts: Sequence[EncodedPost]) -> dict[str, np.ndarray]:
    """What is known of every pair without a model: columns as `assess` reads them."""
    columns: dict[str, list] = {"post": [], "domain": [], "grade": []}
    columns |= {"chosen_tokens": [], "rejected_tokens": []}
    for post, i in pairs_of(posts):
        chosen, rejected = (len(post.replies[reply]) for reply in post.pairs[i])
        grade = post.grades[i] if post.grades else ""
        row = (post.post_id, post.domain, grade, chosen, rejected)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return {name: np.asarray(column) for name, column in columns.items()}


def pair_texts(post: EncodedPost, pair: int, tokenizer: Tokenizer) -> dict[str, str]:
    """Question, chosen and rejected reply as the model read them, without the template."""
    chosen, rejected = (post.replies[reply] for reply in post.pairs[pair])
    question = post.prompt[len(tokenizer.prefix) : len(post.prompt) - len(tokenizer.suffix)]
    texts = {"prompt": question, "chosen": chosen, "rejected": rejected}
    return {name: tokenizer.decode(tokens) for name, tokens in texts.items()}
