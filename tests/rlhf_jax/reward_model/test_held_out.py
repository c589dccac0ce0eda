import numpy as np
import pytest

from experiment_runs import run as runs
from rlhf_jax.config import RewardConfig
from rlhf_jax.reward_model import encoding
from rlhf_jax.reward_model.held_out import assess_and_keep, pair_labels


@pytest.fixture(scope="module")
def posts(toy, random_posts):
    counts = {"train": 12, "validation": 6, "test": 10}
    return {
        name: encoding.encode_posts(random_posts(count, seed=count), toy.tokenizer, max_tokens=99)[
            0
        ]
        for name, count in counts.items()
    }


@pytest.fixture(scope="module")
def examined(toy, posts, tmp_path_factory):
    """A run whose model prefers the wrong reply of every test pair but the first."""
    random = np.random.default_rng(0)

    def scores(name):
        count = sum(len(post.pairs) for post in posts[name])
        return {"chosen": random.normal(size=count), "rejected": random.normal(size=count)}

    def stage(run):
        run.sample(step=0, input_chosen="x", input_rejected="y")
        run.log(step=1, loss=1.0)
        scored = {name: scores(name) for name in ("validation", "test")}
        wrong = 1.0 + np.arange(len(scored["test"]["chosen"]))
        wrong[0] = -1.0
        scored["test"]["rejected"] = scored["test"]["chosen"] + wrong
        run.finish(**assess_and_keep(run, posts, scored, scores("test"), toy.tokenizer, seed=0))

    root = tmp_path_factory.mktemp("runs")
    return runs.ensure("reward", RewardConfig(), stage, inputs={}, root=root)


def test_labels_and_lengths_are_those_of_the_pairs(posts):
    labels = pair_labels(posts["test"])
    rows = zip(*labels.values(), strict=True)
    for post in posts["test"]:
        for chosen, rejected in post.pairs:
            lengths = len(post.replies[chosen]), len(post.replies[rejected])
            assert next(rows) == (post.post_id, post.domain, "", *lengths)
    assert next(rows, None) is None


def test_every_pair_is_kept_as_numbers(examined, posts):
    pairs = examined.arrays("test_pairs")
    assert {len(column) for column in pairs.values()} == {sum(len(p.pairs) for p in posts["test"])}
    np.testing.assert_array_equal(
        pairs["longer"], pairs["chosen_tokens"] - pairs["rejected_tokens"]
    )
    assert all(column.dtype.kind in "fibU" for column in pairs.values())
    assert set(examined.arrays("roc")) == {"false_positive", "true_positive"}
    assert set(examined.arrays("validation_pairs")) < set(pairs)


def test_the_worst_mistakes_are_kept_as_text_behind_the_inputs(examined, posts, toy):
    mistakes = examined.summary["mistakes"]
    post, number = [(p, i) for p in posts["test"] for i in range(len(p.pairs))][-1]
    assert mistakes[0]["post"] == post.post_id
    texts = [row for row in examined.samples() if "mistake" in row]
    assert [row["mistake"] for row in texts] == [own["pair"] for own in mistakes]
    chosen, rejected = (post.replies[reply] for reply in post.pairs[number])
    assert texts[0]["chosen"] == toy.tokenizer.decode(chosen[:-1])
    assert texts[0]["rejected"] == toy.tokenizer.decode(rejected[:-1])
    template = toy.tokenizer.decode(toy.tokenizer.prefix)
    assert not template or not texts[0]["prompt"].startswith(template)
    assert len(texts[0]["prompt"]) == len(post.prompt) - toy.tokenizer.template_length
    assert examined.samples()[0]["input_chosen"] == "x"
    assert all(row["step"] == 2 for row in texts)  # a run that is resumed at 1 drops them
