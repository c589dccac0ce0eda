import numpy as np
import pytest

from rlhf_jax.intervals import bootstrap, bootstrap_crossed, by_group


def test_the_interval_of_a_mean_is_two_standard_errors_wide_on_each_side():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.count == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_it_covers_the_truth_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    found = [bootstrap(rng.normal(size=60), resamples=300, seed=i) for i in range(300)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.90 <= covered <= 0.98


def test_pairs_of_one_post_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
    posts = np.repeat(np.arange(50).astype(str), 8)
    apart, together = bootstrap(values), bootstrap(values, clusters=posts)
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(
        8**0.5, rel=0.1
    )


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_groups_have_intervals_of_their_own_members():
    values = np.asarray([1.0, 1.0, 0.0, 0.0, 1.0])
    domains = np.asarray(["x", "x", "y", "y", "y"])
    posts = np.asarray(["1", "2", "3", "3", "4"])
    found = by_group(values, domains, clusters=posts)
    assert found["x"] == {"value": 1.0, "low": 1.0, "high": 1.0, "count": 2}
    assert found["y"]["value"] == pytest.approx(1 / 3) and found["y"]["count"] == 3
    assert (found["y"]["low"], found["y"]["high"]) == (0.0, 1.0)


def test_one_seed_has_the_interval_of_its_items():
    values = np.random.default_rng(0).normal(size=(1, 200))
    conversations = np.arange(200) // 4
    crossed = bootstrap_crossed(values, clusters=conversations)
    alone = bootstrap(values[0], clusters=conversations)
    assert crossed.value == alone.value
    assert crossed.high - crossed.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_seeds_that_differ_widen_the_interval_by_their_own_spread():
    """Twenty seeds with means of their own, and items that add a known deviation to the mean."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=400)
    of_seeds = rng.normal(size=(20, 1))
    found = bootstrap_crossed(items[None] + of_seeds)
    deviation = (of_seeds.var() / 20 + items.var() / 400) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    same = bootstrap_crossed(np.tile(items, (20, 1)))
    assert same.high - same.low == pytest.approx(2 * 1.96 * items.std() / 20, rel=0.1)


def test_prompts_of_one_conversation_are_drawn_together_with_every_seed():
    values = np.tile(np.repeat(np.random.default_rng(0).normal(size=50), 8), (3, 1))
    apart = bootstrap_crossed(values)
    together = bootstrap_crossed(values, clusters=np.repeat(np.arange(50), 8))
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(
        8**0.5, rel=0.1
    )
