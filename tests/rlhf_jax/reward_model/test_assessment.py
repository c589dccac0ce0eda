"""The figures about held-out pairs against counts by hand, scalar loops and committed runs."""

import numpy as np
import pytest

from experiment_runs.inventory import find
from experiment_runs.settings import RESULTS
from rlhf_jax.reward_model import assessment
from rlhf_jax.reward_model.assessment import LENGTHS, assess


def columns(difference, *, seed=0, posts=None):
    """Pairs whose scores differ by so much."""
    random = np.random.default_rng(seed)
    count = len(difference)
    rejected = random.normal(size=count)
    return {
        "post": np.asarray(posts if posts is not None else [f"p{i // 3}" for i in range(count)]),
        "domain": np.asarray(["a", "b"])[np.arange(count) % 2],
        "grade": np.full(count, ""),
        "chosen": rejected + difference,
        "rejected": rejected,
        "chosen_tokens": random.integers(5, 100, count),
        "rejected_tokens": random.integers(5, 100, count),
    }


def logistic_differences(count, temperature, seed=0):
    """Differences whose sign agrees with people as often as the temperature says."""
    random = np.random.default_rng(seed)
    size = random.exponential(3.0, count)
    right = random.random(count) < 1 / (1 + np.exp(-size / temperature))
    return np.where(right, size, -size)


def test_the_confusion_matrix_counts_the_order_in_which_replies_are_shown():
    difference = np.array([2.0, -1.0, 3.0, 1.0, -2.0])
    flipped = np.array([False, False, True, True, True])
    found = assessment.verdicts(difference, flipped, np.arange(5))
    assert found["confusion"].tolist() == [[1, 1], [1, 2]]
    shares = [[row[name] for name in ("precision", "recall", "f1")] for row in found["report"]]
    assert shares == [pytest.approx([1 / 2] * 3), pytest.approx([2 / 3] * 3)]
    assert [row["support"] for row in found["report"]] == [2, 3]


def test_a_verdict_that_is_never_given_has_precision_zero():
    found = assessment.verdicts(np.ones(3), np.zeros(3, bool), np.arange(3))
    assert found["confusion"].tolist() == [[3, 0], [0, 0]] and found["auc"]["value"] == 0.5
    never = dict(found["report"][1])
    assert never.pop("class") == "second preferred" and set(never.values()) == {0}
    curve = assessment.roc_curve(np.ones(3), np.ones(3, bool))
    assert np.trapezoid(curve["true_positive"], curve["false_positive"]) == 0.5


@pytest.mark.parametrize("stage", ["reward", "second_reward"])
def test_the_figures_of_committed_runs_are_found_again(stage):
    """Whatever version of scikit-learn computes them."""
    run = find(stage, RESULTS / "reference")
    pairs, roc, stored = run.arrays("test_pairs"), run.arrays("roc"), run.summary["verdicts"]
    difference = pairs["chosen"] - pairs["rejected"]
    flipped = assessment.coin(len(difference), run.config["seed"])
    found = assessment.verdicts(difference, flipped, pairs["post"])
    assert found["confusion"].tolist() == stored["confusion"]
    for name in ("value", "low", "high"):
        assert found["auc"][name] == pytest.approx(stored["auc"][name], abs=1e-12)
    for row, expected in zip(found["report"], stored["report"], strict=True):
        assert row == pytest.approx(expected, abs=1e-12)
    curve = assessment.roc_curve(np.where(flipped, -difference, difference), ~flipped)
    for name, values in curve.items():
        np.testing.assert_allclose(values, roc[name], atol=1e-12)


def test_half_of_the_pairs_are_flipped_so_that_a_constant_verdict_is_worth_nothing():
    flipped = assessment.coin(400, seed=3)
    assert flipped.sum() == 200 and (assessment.coin(400, seed=4) != flipped).any()
    always_first = np.where(flipped, -1.0, 1.0)
    assert assessment.verdicts(always_first, flipped, np.arange(400))["auc"]["value"] == 0.5


def test_the_area_under_the_curve_is_the_share_of_couples_in_order():
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, 40).astype(float)  # with ties
    positive, weights = random.random(40) < 0.4, random.integers(0, 4, 40).astype(float)
    couples = right = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            couples += weights[i] * weights[j]
            right += (
                weights[i] * weights[j] * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
            )
    assert assessment.area_under_curve(scores, positive, weights) == pytest.approx(right / couples)
    assert assessment.area_under_curve(scores, np.ones(40, bool), weights) == 0.5


def test_the_curve_has_that_area():
    random = np.random.default_rng(1)
    positive = random.random(60) < 0.5
    scores = np.round(random.normal(size=60) + positive, 1)
    curve = assessment.roc_curve(scores, positive)
    area = np.trapezoid(curve["true_positive"], curve["false_positive"])
    assert area == pytest.approx(assessment.area_under_curve(scores, positive, np.ones(60)))
    assert (curve["true_positive"][0], curve["true_positive"][-1]) == (0, 1)


def test_the_interval_of_the_area_is_wider_where_posts_have_many_pairs():
    difference = np.repeat(np.random.default_rng(0).normal(0.5, 1, 60), 6)
    flipped = assessment.coin(360, seed=0)
    apart, together = (
        assessment.verdicts(difference, flipped, clusters)["auc"]
        for clusters in (np.arange(360), np.repeat(np.arange(60), 6))
    )
    assert apart["value"] == together["value"]
    assert together["high"] - together["low"] > 1.7 * (apart["high"] - apart["low"])


@pytest.mark.parametrize("temperature", [0.4, 5.0])
def test_the_temperature_of_drawn_preferences_is_recovered(temperature):
    difference = logistic_differences(30_000, temperature)
    assert assessment.fitted_temperature(difference) == pytest.approx(temperature, rel=0.06)
    scaled = 1000 * difference
    assert assessment.fitted_temperature(scaled) == pytest.approx(1000 * temperature, rel=0.06)


def test_scores_that_say_nothing_get_the_largest_temperature():
    difference = np.array([1.0, -1.0, 2.0, -2.0])
    assert assessment.fitted_temperature(difference) == pytest.approx(1000 * difference.std())
    assert np.isfinite(assessment.fitted_temperature(np.zeros(4)))


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy():
    sure, unsure = np.log(0.92 / 0.08), np.log(0.58 / 0.42)
    log_odds = np.array([sure, sure, sure, -sure] + [unsure, -unsure])
    found = assessment.calibration(log_odds, np.arange(6))
    assert [own["count"] for own in found["bins"]] == [2, 4]
    assert [own["confidence"] for own in found["bins"]] == pytest.approx([0.58, 0.92])
    assert [own["value"] for own in found["bins"]] == [0.5, 0.75]
    assert found["error"] == pytest.approx(4 / 6 * (0.92 - 0.75) + 2 / 6 * (0.58 - 0.5))
    expected = -np.log([0.92, 0.92, 0.92, 0.08, 0.58, 0.42]).mean()
    assert found["log_loss"] == pytest.approx(expected)


def test_the_fitted_temperature_calibrates_other_pairs():
    validation, test = (logistic_differences(8000, 6.0, seed=seed) for seed in (0, 1))
    found = assess(
        columns(test), columns(validation), {}, assessment.coin(len(test), 0)
    )["calibration"]  # fmt: skip
    assert found["before"]["error"] > 0.2
    assert found["after"]["error"] < 3 * found["after"]["error_by_chance"] < 0.05
    assert found["after"]["log_loss"] < found["before"]["log_loss"]


def test_pairs_are_grouped_by_the_ratio_of_their_lengths():
    pairs = columns(np.array([1.0, 1.0, -1.0, 1.0, -1.0, 1.0]))
    pairs["chosen_tokens"] = np.array([40, 70, 95, 115, 150, 300])
    pairs["rejected_tokens"] = np.full(6, 100)
    found = assessment.accuracies(pairs["chosen"] - pairs["rejected"], pairs)
    values = {name: own["value"] for name, own in found["accuracy_by_length"].items()}
    assert values == dict(zip(LENGTHS, (1.0, 1.0, 0.5, 0.0, 1.0), strict=True))
    assert found["accuracy_alike"]["value"] == 0.5 and "accuracy_by_grade" not in found


def test_the_gain_over_a_baseline_is_measured_pair_by_pair():
    difference = np.random.default_rng(0).normal(0.4, 1, 300)
    test = columns(difference)
    worse = np.where(np.arange(300) < 30, -np.abs(difference), difference)
    found = assess(test, test, {"same": difference, "worse": worse}, assessment.coin(300, 0))
    assert found["baselines"]["same"]["gain"] == {"value": 0, "low": 0, "high": 0, "count": 300}
    lost = (difference[:30] > 0).mean() * 30 / 300
    assert found["baselines"]["worse"]["gain"]["value"] == pytest.approx(lost)
    assert found["baselines"]["worse"]["accuracy"]["value"] < found["accuracy"]["value"]


def test_mistakes_are_the_surest_ones_of_different_posts():
    log_odds = np.array([1.0, -3.0, -2.0, -5.0, -0.5, -1.0, 2.0])
    pairs = columns(log_odds, posts=["a", "b", "c", "c", "d", "e", "f"])
    found = assessment.mistakes(log_odds, pairs)
    assert [own["pair"] for own in found] == [3, 1, 5, 4]
    assert found[0]["confidence"] == pytest.approx(1 / (1 + np.exp(-5)))
    assert found[0]["chosen"] == pairs["chosen"][3] and found[0]["post"] == "c"
