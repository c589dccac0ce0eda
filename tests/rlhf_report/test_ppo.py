"""What the chapter on PPO says follows from the numbers of the runs."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiment_runs.run import Run
from rlhf_jax import profiles
from rlhf_jax.experiment import Experiment
from rlhf_report import ppo

RECORD = {"stage": "stage", "identity": "0", "config": {}, "inputs": {}, "about": {}}


@pytest.fixture
def trained(tmp_path):
    """A run whose logged KLs per token are given."""

    def write(*kls, stage="ppo-full"):
        path = tmp_path / f"{stage}-0123456789"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(RECORD | {"stage": stage}))
        (path / "summary.json").write_text('{"identity": "0", "reward_last_quarter": 0.5}')
        run = Run(path)
        for step, kl in enumerate(kls, start=1):
            histogram = np.eye(16, dtype=int)[step].tolist()
            run.log(step=step, kl=kl, kl_weight=0.1, reward=0.0, reward_histogram=histogram)
        return run

    return write


@pytest.mark.parametrize(
    ("kls", "words"),
    [
        ((0.0, 0.03, 0.05, 0.06), "inside the band at 0.0600 nats per token"),
        ((0.0, 0.001, 0.002, 0.003), "below the band at 0.0030"),
        ((0.0, 0.05, 0.09, 0.2), "above the band at 0.2000"),
    ],
)
def test_the_kl_is_read_against_the_protocols_band(trained, kls, words):
    assert words in ppo.kl_reading(trained(*kls))


def test_the_kl_table_says_how_long_and_since_when_each_run_was_inside(trained):
    runs = {"ppo-full": trained(0.0, 0.03, 0.15, 0.06), "ppo-lora-1": trained(0.0, 0.01, stage="b")}
    full, lora = ppo.kl_table(runs).to_dict("records")
    assert full["steps inside"] == "2 of 4" and full["first inside"] == 2
    assert lora["policy"] == "PPO, LoRA, seed 1" and lora["steps inside"] == "0 of 2"
    assert lora["KL per token at the end"] == 0.01


def test_the_reward_distribution_shows_the_share_of_each_class(trained):
    ppo.reward_distribution_figure({"ppo-full": trained(0.0, 0.1, 0.1)})
    mesh = plt.gcf().axes[0].collections[0]
    assert all(tick == int(tick) for tick in plt.gcf().axes[0].get_xticks())
    shares = np.asarray(mesh.get_array()).reshape(16, 3)
    np.testing.assert_array_equal(shares, np.eye(16)[[1, 2, 3]].T)
    plt.close("all")


def test_committed_policies_are_found_by_their_stages_variants_first(trained, tmp_path):
    for stage in ("ppo-leave-one-out", "ppo-full-1", "ppo-lora", "ppo-full"):
        trained(0.0, stage=stage)
    experiment = Experiment(profile=profiles.profile("tiny"), committed=tmp_path)
    expected = ["ppo-full", "ppo-lora", "ppo-full-1", "ppo-leave-one-out"]
    assert experiment.policies == expected
    assert [experiment.run(name).stage for name in expected] == expected


def learner(rate, steps=156):
    return SimpleNamespace(config={"learning_rate": rate}, summary={"steps": steps})


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((1e-5, 1e-5), "the same"),
        ((1e-5, 1e-4), "10 times as much"),
        ((1e-5, 5e-6), "2 times less"),
        ((5e-5, 2.5e-3), "50 times as much"),
    ],
)
def test_the_learning_rates_are_printed_so_that_their_ratio_holds(rates, words):
    told = ppo.learning_rates_reading(*map(learner, rates))
    full, lora = map(float, told.split(",")[0].split(" and "))
    assert told.endswith(f", {words}") and (full, lora) == rates


@pytest.mark.parametrize(
    ("rate", "steps", "words"),
    [
        (1e-5, 156, "156 steps at one learning rate leave the seed"),
        (1e-4, 156, "The learning rates of the two variants differ"),
        (1e-5, 20, "20 steps are few beside the protocol's 156, so the variants"),
        (1e-4, 20, "20 steps are few beside the protocol's 156, and the learning rates"),
    ],
)
def test_why_the_variants_are_not_ranked_follows_from_rates_and_steps(rate, steps, words):
    told = ppo.limits_reading(learner(1e-5, steps), learner(rate, steps))
    assert told.startswith(words)
    assert ("differ" in told) == (rate != 1e-5) and ("few" in told) == (steps < 156)


@pytest.mark.parametrize(("error", "words"), [(0.0, "exactly 1"), (0.002, "1 to within 0.002")])
def test_the_first_ratio_is_as_near_to_1_as_it_was_measured(trained, error, words):
    run = trained()
    run.log(step=1, first_ratio_error=error)
    assert ppo.first_ratio_reading(run).startswith(words)


@pytest.mark.parametrize(
    ("dropout", "steps", "words"),
    [
        (0.2, 3, "Later the ratios of an update's first pass differ from 1 by 0.012"),
        (0.0, 3, "Its rate was 0 in this run"),
        (0.2, 1, "There was one update"),
    ],
)
def test_what_dropout_does_to_later_ratios_is_told_where_it_does_anything(
    trained, dropout, steps, words
):
    run = trained()
    run.record["config"]["lora"] = {"dropout": dropout}
    for step in range(1, steps + 1):
        run.log(step=step, first_ratio_error=0.012 * (step > 1), first_approx_kl=1e-4)
    assert ppo.dropout_reading(run).startswith(words)


def test_the_worked_advantages_are_those_of_the_recursion():
    rows = ppo.advantage_example(SimpleNamespace(config={"discount": 0.9, "gae_decay": 0.8}))
    following = 0.0
    for row in rows[::-1].itertuples():
        following = row.delta + 0.9 * 0.8 * following
        assert row.advantage == pytest.approx(following, abs=1e-6)
    assert rows["delta"].iloc[-1] == pytest.approx(0.8 - 0.5)


def test_few_plain_labels_stand_on_a_logarithmic_axis_and_no_line_lies_on_the_frame(trained):
    runs = {"ppo-full": trained(0.0, 0.04, 0.04)}
    ppo.kl_figure(runs)
    figure = plt.gcf()
    figure.canvas.draw()
    kl, weight, _ = figure.axes
    low, high = weight.get_ylim()
    ticks = [x for x in weight.get_yticks() if low <= x <= high]
    assert 1 <= len(ticks) <= 8 and not len(weight.get_yticks(minor=True))
    assert kl.get_ylim()[0] == 0 and kl.get_ylim()[1] > 0.04
    assert all(tick == int(tick) for tick in kl.get_xticks())
    plt.close("all")


def test_a_policy_without_a_critic_is_left_out_of_the_critics_panel_alone(trained):
    runs = {"ppo-full": trained(0.0), "ppo-group": trained(0.0, stage="ppo-group")}
    for run, values in zip(runs.values(), ({"explained_variance": 0.1}, {}), strict=True):
        run.log(step=2, entropy=2.0, **values)
    ppo.learning_figure(runs)
    drawn = [len(ax.lines) for ax in plt.gcf().axes]
    assert drawn == [2, 1]
    plt.close("all")


def test_every_estimator_is_told_from_where_to_where_it_gets(trained):
    runs = {name: trained(stage=name) for name in ppo.ESTIMATORS.values()}
    for run in runs.values():
        for step in range(1, 21):
            run.log(step=step, reward=step / 25)
        run.sample(step=20, response="A *the*")
        (run.path / "times.jsonl").write_text('{"seconds": 50.0}\n{"seconds": 71.0}\n')
    told = ppo.known_optimum_reading(runs)
    assert "group (GRPO) from 0.06 to 0.78 in 20 steps and 2 minutes, with" in told
    assert told.count(" to ") == 3
    assert told.count("\u201cA *the*\u201d") == 3
    ppo.known_optimum_figure(runs)
    *curves, largest = plt.gca().lines
    assert len(curves) == 3 and set(largest.get_ydata()) == {1}
    plt.close("all")


@pytest.mark.parametrize(("penalty", "words"), [(0.0, "pays nothing"), (0.5, "cut by 0.5")])
def test_what_a_cut_response_pays_is_said_as_mathematics(penalty, words):
    """A bare string with dollars would be mathematics to Quarto alone, so it is refused."""
    shown = ppo.missing_end_reading(SimpleNamespace(config={"missing_end_penalty": penalty}))
    assert words in shown.data
