"""Best of n against every way to take n of a few samples, and against distributions written out."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.baselines.best_of_n import best_of_n, best_of_n_kl, powers_of_two

REWARDS, JUDGED = np.random.default_rng(0).normal(size=(2, 3, 6))


@pytest.mark.parametrize("n", range(1, 7))
def test_it_is_the_mean_over_every_way_to_take_n_samples(n):
    ways = [list(way) for way in itertools.combinations(range(6), n)]
    for judged in (REWARDS, JUDGED):
        expected = [
            np.mean([own[way[np.argmax(rewards[way])]] for way in ways])
            for rewards, own in zip(REWARDS, judged, strict=True)
        ]
        np.testing.assert_allclose(best_of_n(REWARDS, judged, n), expected)


@pytest.mark.parametrize("n", [0, 7])
def test_more_than_there_are_cannot_be_chosen_from(n):
    with pytest.raises(ValueError, match=f"n={n} must be from 1 to the 6"):
        best_of_n(REWARDS, REWARDS, n)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_no_distribution_is_further_away_and_one_of_many_responses_nearly_is(n):
    """The exact KL where every response has a reward of its own: P(best <= i) = F(i)^n."""
    kls = []
    for words in (2, 10, 5000):
        p = np.full(words, 1 / words)
        best = np.diff(np.concatenate([[0], np.cumsum(p) ** n]))
        kls.append((best[best > 0] * np.log((best / p)[best > 0])).sum())
    assert max(kls) <= best_of_n_kl(n) + 1e-12
    assert kls[-1] == pytest.approx(best_of_n_kl(n), abs=2e-3)
    assert best_of_n_kl(n) == pytest.approx(math.log(n) - 1 + 1 / n)


def test_the_numbers_drawn_are_powers_of_two_that_the_samples_suffice_for():
    assert [powers_of_two(samples) for samples in (1, 3, 4, 64)] == [
        [1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16, 32, 64],
    ]  # fmt: skip
