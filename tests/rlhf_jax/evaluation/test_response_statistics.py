"""Gains that are known before anything is computed."""

import numpy as np
import pytest

from rlhf_jax.config import EvaluationConfig
from rlhf_jax.evaluation import response_statistics
from rlhf_jax.evaluation.response_statistics import describe, gain_over_seeds

CFG = EvaluationConfig(resamples=200)
INTERVALS = ("reward", "second_reward", "length_controlled", "stratified")


def gain_of(own, base):
    """The gain where every prompt is a conversation of its own."""
    return response_statistics.gain(own, base, np.arange(len(base["tokens"])), CFG)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(5, 60, 120)


def columns(tokens, reward, **other):
    tokens, reward = np.asarray(tokens)[:, None], np.asarray(reward, np.float64)[:, None]
    return {"tokens": tokens, "reward": reward, "second_reward": -2 * reward} | other


def test_a_reward_that_is_length_has_a_plain_gain_and_none_between_equal_lengths(tokens):
    longer = tokens[::-1] + 7  # the lengths of other prompts, 7 tokens longer on average
    gain = gain_of(columns(longer, 0.5 * longer), columns(tokens, 0.5 * tokens))
    assert gain["tokens"]["value"] == pytest.approx(7)
    assert gain["reward"]["value"] == pytest.approx(3.5)
    for name in ("value", "low", "high"):
        assert gain["length_controlled"][name] == pytest.approx(0, abs=1e-9)


def test_identical_policies_gain_nothing_and_tie_everywhere(tokens):
    same = columns(tokens, np.sin(tokens))
    gain = gain_of(same, same)
    assert (gain["wins"], gain["ties"], gain["losses"]) == (0, 120, 0)
    for name in ("reward", "second_reward", "tokens"):
        assert gain[name] == {"value": 0, "low": 0, "high": 0, "count": 120}
    for name in ("length_controlled", "stratified"):
        assert gain[name] == pytest.approx({"value": 0, "low": 0, "high": 0, "count": 120})


def test_a_constant_shift_at_equal_lengths_is_the_gain_however_length_is_treated(tokens):
    reward = np.random.default_rng(1).normal(size=120)
    gain = gain_of(columns(tokens, reward + 1.25), columns(tokens, reward))
    for name in ("reward", "length_controlled", "stratified"):
        for end in ("value", "low", "high"):
            assert gain[name][end] == pytest.approx(1.25)
    assert gain["second_reward"]["value"] == pytest.approx(-2.5)
    assert (gain["wins"], gain["ties"], gain["losses"]) == (120, 0, 0)


def test_the_controlled_gain_is_that_of_least_squares_with_an_intercept_for_each_policy(tokens):
    rng = np.random.default_rng(2)
    lengths = np.stack([rng.integers(20, 80, 120), tokens]).astype(np.float64)
    rewards = 0.03 * lengths + rng.normal(size=(2, 120)) + [[0.4], [0.0]]
    policy = np.repeat([1.0, 0.0], 120)
    table = np.stack([policy, 1 - policy, lengths.ravel()], axis=1)
    (own, other, slope), *_ = np.linalg.lstsq(table, rewards.ravel())
    assert slope == pytest.approx(0.03, abs=0.01)
    assert response_statistics.length_controlled_gain(rewards, lengths) == pytest.approx(
        own - other
    )


def test_lengths_that_do_not_vary_explain_nothing():
    lengths = np.repeat([[9.0], [4.0]], 3, axis=1)
    rewards = np.asarray([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0]])
    assert response_statistics.length_controlled_gain(rewards, lengths) == pytest.approx(3)


def test_classes_of_length_with_responses_of_one_policy_only_are_left_out():
    lengths = np.asarray([[1.0, 1, 5, 5], [5, 5, 9, 9]])
    rewards = np.asarray([[100.0, 100, 3, 5], [1, 2, -50, -50]])
    assert response_statistics.stratified_gain(rewards, lengths) == pytest.approx(4 - 1.5)
    apart = np.asarray([[1.0, 1, 1, 1], [9, 9, 9, 9]])
    assert np.isnan(response_statistics.stratified_gain(rewards, apart))


def test_classes_of_length_count_by_their_responses():
    """Four short ones that gain 3 - 1, two long ones that gain 10 - 2."""
    lengths = np.asarray([[1.0, 1, 9], [1, 9, 1]])
    rewards = np.asarray([[2.0, 4, 10], [0, 2, 2]])
    assert response_statistics.stratified_gain(rewards, lengths) == pytest.approx(
        (4 * 2 + 2 * 8) / 6
    )


def test_wins_ties_and_losses_are_counted_prompt_by_prompt():
    own, base = [2.0, 1, 0, 5, 3, 9], [1.0, 1, 1, 3, 3, 6]
    gain = gain_of(columns(range(6), own), columns(range(6), base))
    assert (gain["wins"], gain["ties"], gain["losses"]) == (3, 2, 1)


def test_the_interval_of_a_gain_holds_its_value_and_zero_only_without_a_shift(tokens):
    """Noise of deviation 1 on 120 prompts: a shift of 1 is eight standard errors."""
    rng = np.random.default_rng(3)
    own, base = rng.normal(size=(2, 120))
    base, lengths = columns(tokens, base), rng.permutation(tokens)
    for shift in (0, 1):
        gain = gain_of(columns(lengths, own + shift), base)
        for name in INTERVALS:
            low, value, high = (gain[name][end] for end in ("low", "value", "high"))
            assert low < value < high and (low <= 0 <= high) == (shift == 0), name


def test_a_policy_is_described_per_token_and_per_response():
    own = {
        "tokens": np.asarray([[2, 2], [4, 4]]),
        "reward": np.asarray([[1.0, 2], [3, 6]]),
        "second_reward": np.asarray([[-2.0, -4], [-6, -12]]),
        "kl": np.asarray([[1.0, 2], [3, 12]]),
        "surprise": np.log([[2.0, 2], [4, 16]]),
        "ended": np.asarray([[True, False], [True, True]]),
    }
    found = describe(
        own, ["", " \n", "a b", "a b"], np.arange(2), CFG, rewards=["reward", "second_reward"]
    )
    assert found["reward"]["value"] == 3 and found["second_reward"]["value"] == -6
    assert found["reward"]["count"] == 2
    means = ("kl_per_token", "kl_per_sequence", "tokens", "ended", "empty")
    assert [found[name] for name in means] == [18 / 12, 18 / 4, 3, 0.75, 0.5]
    assert (found["distinct_1"], found["distinct_2"], found["repetition"]) == (0.5, 0.5, 0)
    assert found["perplexity"] == pytest.approx(256 ** (1 / 12))


def test_a_gain_over_seeds_is_their_mean_and_as_uncertain_as_they_differ():
    rng = np.random.default_rng(0)
    base = columns(np.full(200, 5), rng.normal(size=200))

    def seed(shift):
        return columns(np.full(200, 5), base["reward"][:, 0] + shift)

    found = [
        gain_over_seeds(list(map(seed, shifts)), base, np.arange(200), CFG)
        for shifts in ((1.0, 1.0, 1.0), (0.0, 1.0, 2.0))
    ]
    for own in found:
        assert own["reward"]["value"] == pytest.approx(1) and own["seeds"] == 3
        assert own["second_reward"]["value"] == pytest.approx(-2)
    widths = [own["reward"]["high"] - own["reward"]["low"] for own in found]
    assert widths[0] == pytest.approx(0, abs=1e-9) and widths[1] > 1


def test_several_responses_to_a_prompt_count_as_one_prompt():
    """Twice the same responses are no more evidence; the interval stays what it is."""
    rng = np.random.default_rng(4)
    once = [columns(rng.integers(5, 60, 50), rng.normal(size=50)) for _ in range(2)]
    twice = [{name: np.repeat(x, 2, axis=1) for name, x in own.items()} for own in once]
    assert gain_of(*once)["reward"] == pytest.approx(gain_of(*twice)["reward"])
    for name in ("low", "high"):
        assert gain_of(*once)["length_controlled"][name] == pytest.approx(
            gain_of(*twice)["length_controlled"][name]
        )


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b a b", "a b"], 2 / 4),  # ab ba ab, ab: none across texts
        (["a b c", "d e"], 1),
        (["a", ""], 0),
    ],
)
def test_distinct_is_the_share_of_different_bigrams(texts, expected):
    assert response_statistics.distinct(texts, 2) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b c d a b c d", 1 / 5), ("a a a a a a", 2 / 3), ("a b c d e", 0), ("a a a", 0), ("", 0)],
)
def test_repeated_is_the_share_of_four_grams_seen_before(text, expected):
    assert response_statistics.repeated(text) == pytest.approx(expected)


def test_policies_without_a_length_in_common_cannot_be_compared_within_classes():
    short, long = np.full(30, 5), np.full(30, 50)
    gain = gain_of(columns(long, np.ones(30)), columns(short, np.zeros(30)))
    assert all(np.isnan(gain["stratified"][name]) for name in ("value", "low", "high"))
    assert gain["reward"]["value"] == 1
