"""Rewards that a user writes: functions of texts, and weighted sums."""

import jax
import numpy as np
import pytest

from experiment_runs import devices, hosts
from experiment_runs.errors import UserError
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.reward_identity import function_fingerprint
from rlhf_jax.ppo.rewards import function_rewards, reward_terms

TEXTS = ["cc", "", "abc"]


def count_c(prompts, responses):
    return [response.count("c") for response in responses]


def count_a(prompts, responses):
    return [response.count("a") for response in responses]


@pytest.fixture
def train_with(train_toy):
    """A function that runs PPO on the toy with a reward of one's own for a few steps."""

    def run(root, reward, **changes):
        def train(run, cfg, toy, reward_model, prompts):
            ppo_training.train(run, cfg, toy, reward(reward_model), prompts)

        return train_toy("full", root, train=train, **{"passes": 4} | changes)[0]

    return run


def test_of_several_processes_the_first_alone_asks_and_all_get_what_it_was_told(monkeypatch):
    """A judge that costs money or gives another answer each time is asked once."""
    told = {}
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "of_first", lambda found: told.setdefault("found", found))
    first = function_rewards({"c": count_c}, TEXTS, TEXTS)
    monkeypatch.setattr(hosts, "first", lambda: False)
    other = function_rewards({"c": lambda *_: pytest.fail("asked again")}, TEXTS, TEXTS)
    assert first["c"].tolist() == other["c"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("several", [True, False])
def test_what_a_function_computes_is_of_its_own_process_where_the_others_do_not_come(
    monkeypatch, several
):
    def own(prompts, responses):
        assert devices.parted() != several
        return jax.numpy.arange(3.0)

    monkeypatch.setattr(hosts, "several", lambda: several)
    monkeypatch.setattr(hosts, "of_first", lambda found: found)
    with devices.placement():
        assert devices.parted()
        assert function_rewards({"own": own}, TEXTS, TEXTS)["own"].tolist() == [0, 1, 2]
        assert devices.parted()


def test_a_function_of_texts_is_optimised(train_with, tmp_path):
    run = train_with(tmp_path, lambda reward_model: count_c, passes=25)
    rewards = run.metrics()["reward"]
    assert rewards.iloc[0] < 1.5 and rewards.iloc[-1] > 3.8  # of four letters
    sample = run.samples()[-1]
    assert sample["reward"] == sample["response"].count("c")


def test_a_reward_model_beside_functions_is_added_up_with_the_weights(train_with, tmp_path):
    parts = {"model": 0.5, "c": 2.0, "a": -1.0}
    run = train_with(
        tmp_path,
        lambda reward_model: {
            "model": (reward_model, 0.5),
            "c": (count_c, 2.0),
            "a": (count_a, -1.0),
        },
    )
    rows = run.metrics()
    total = sum(rows[f"reward_{name}"] for name in parts)
    np.testing.assert_allclose(rows["reward"], total, rtol=1e-5)
    assert (rows["reward_a"] <= 0).all() and (rows["reward_c"] > 0).all()


def test_shares_of_a_reward_model_make_the_whole(train_with, timeless, tmp_path):
    whole = timeless(train_with(tmp_path / "a", lambda reward_model: reward_model))
    halves = timeless(
        train_with(
            tmp_path / "b",
            lambda reward_model: {"x": (reward_model, 0.25), "y": (reward_model, 0.75)},
        )
    )
    for name in ("reward", "kl", "policy_loss", "value_loss", "entropy"):
        np.testing.assert_allclose(halves[name], whole[name], rtol=1e-3, atol=1e-5)


def test_a_function_is_asked_with_the_prompts_that_were_answered(train_with, tmp_path):
    asked = []

    def remember(prompts, responses):
        asked.append((prompts, responses))
        return [0.0] * len(prompts)

    run = train_with(tmp_path, lambda reward_model: remember, sample_every=1)
    for step, (prompts, responses) in enumerate(asked, start=1):
        kept = [row for row in run.samples() if row["step"] == step]
        assert [(row["prompt"], row["response"]) for row in kept] == [
            *zip(prompts[:3], responses[:3], strict=True)
        ]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0, 2.0], r"'mine' returned an array of shape \(2,\); it must return 3 numbers"),
        ([[1.0], [2.0], [3.0]], r"shape \(3, 1\)"),
        (1.0, r"shape \(\)"),
        (None, "'mine' returned"),
        (["good", "bad", "bad"], "'good'.*3 numbers"),
        ([[1.0], [2.0, 3.0], []], "3 numbers"),
        ([1.0, float("nan"), 2.0], "returned nan for the response ''"),
        ([1.0, 2.0, 1e300], "returned 1e\\+300 for the response 'abc'"),
    ],
)
def test_what_is_no_reward_is_told_with_the_function_s_name(returned, told):
    with pytest.raises(UserError, match=told):
        function_rewards({"mine": lambda prompts, responses: returned}, TEXTS, TEXTS)


@pytest.mark.parametrize("returned", [[1, 2, 3], (0.5, 1, 2), np.arange(3), np.ones(3, "float16")])
def test_numbers_in_any_container_are_rewards(returned):
    found = function_rewards({"mine": lambda prompts, responses: returned}, TEXTS, TEXTS)
    assert found["mine"].dtype == np.float32
    np.testing.assert_array_equal(found["mine"], np.asarray(returned, np.float32))


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({}, "at least one"),
        ("length", "reward\\['reward'\\] is 'length'"),
        ({"a": count_a}, "must be a pair"),
        ({"a": (count_a, "2")}, "weight '2'"),
        ({"a": (count_a, float("inf"))}, "weight inf"),
        ({"a": (3, 1.0)}, "reward\\['a'\\] is 3"),
        ({"std": (count_a, 1.0)}, "other uses for that name"),
    ],
)
def test_a_reward_that_cannot_be_used_is_told(reward, told):
    with pytest.raises(UserError, match=told):
        reward_terms(reward)


def test_functions_of_other_text_have_other_fingerprints():
    prints = [
        function_fingerprint(function)
        for function in (count_a, count_c, lambda p, r: [1.0], max, Counter("a"), Counter("b"))
    ]
    assert len(set(prints)) == 6
    assert function_fingerprint(count_a) == prints[0]
    assert function_fingerprint(Counter("a")) == prints[4]


class Counter:
    def __init__(self, letter):
        self.letter = letter

    def __call__(self, prompts, responses):
        return [response.count(self.letter) for response in responses]
