import numpy as np
import pytest

from rlhf_jax.reward_model.assessment import agreement
from rlhf_jax.reward_model.bag_of_words import bag_of_words
from rlhf_jax.reward_model.encoding import EncodedPost

END, WORD = 2, 7


def parts(with_word):
    """Posts of random tokens; in `with_word` of them the chosen reply has one token more."""
    random = np.random.default_rng(0)

    def post(number):
        replies = [[*random.integers(10, 60, random.integers(4, 30))] for _ in range(2)]
        if random.random() < with_word:
            replies[0].insert(random.integers(len(replies[0])), WORD)
        encoded = tuple((*map(int, reply), END) for reply in replies)
        return EncodedPost(f"p{number}", "a", (1,), encoded, ((0, 1),), (), 0)

    counts = {"train": 400, "validation": 100, "test": 400}
    return {name: [post(i) for i in range(count)] for name, count in counts.items()}


@pytest.mark.parametrize(("with_word", "low", "high"), [(1.0, 0.95, 1.0), (0.0, 0.42, 0.58)])
def test_a_word_that_gives_the_preference_away_is_found_and_noise_is_not(with_word, low, high):
    log_odds, _ = bag_of_words(parts(with_word))
    assert low <= agreement(log_odds).mean() <= high


def test_the_test_pairs_have_no_say():
    own = parts(0.5)
    whole, penalty = bag_of_words(own)
    part, same = bag_of_words(own | {"test": own["test"][:7]})
    np.testing.assert_array_equal(part, whole[:7])
    assert penalty == same
