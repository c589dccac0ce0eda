"""What the chapter on evaluation says follows from the numbers of the runs."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from rlhf_report import baselines, evaluation


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 0.3, "higher"), (-0.3, -0.1, "lower"), (-0.1, 0.1, "not")]
)
def test_a_gain_is_one_only_if_its_interval_excludes_zero(low, high, word):
    own = {"reward": {"value": (low + high) / 2, "low": low, "high": high}}
    assert evaluation.gain_reading(own).startswith(word)


def test_seeds_of_a_variant_are_read_together():
    rows = {"ppo-full": 0.1, "ppo-lora": 0.2, "ppo-full-1": -0.3, "ppo-leave-one-out": 9.0}
    mean = {"ppo-full": {"reward": {"value": -0.1, "low": -0.4, "high": 0.2}}}
    summary = {"gains": {name: {"reward": {"value": value}} for name, value in rows.items()}}
    assert evaluation.seeds_reading(summary | {"variants": mean}) == (
        "Gains: PPO, full: -0.30 to 0.10 with 2 seeds, -0.10 [-0.40, 0.20] their mean "
        "(seeds and conversations drawn)."
    )
    assert evaluation.seeds_reading(summary | {"variants": {}}) == (
        "Each variant was trained with one seed."
    )


def test_only_policies_without_a_critic_are_told_as_such():
    def run(**config):
        return SimpleNamespace(config={"prompts": 100} | config, summary={"steps": 25})

    full = run(advantages="gae", responses_per_prompt=1)
    group = run(advantages="group", responses_per_prompt=4)
    told = baselines.critic_free_reading({"ppo-full": full, "ppo-group": group})
    assert told == "group (GRPO): 4 responses to each of 100 prompts, 25 steps."
    told = baselines.critic_free_reading({"ppo-full": full})
    assert told.startswith("No policy without a critic")


@pytest.mark.parametrize(
    "tuned, base",
    [(0.5, -0.25), (0.1236, 0.0454), (-0.0004, 0.0004), (0.5154, 0.0816), (0.2, -0.0004)],
)
def test_a_gain_is_worked_out_and_the_printed_sum_holds(tuned, base):
    policies = {
        name: {"reward": {"value": value}} for name, value in (("pretrained", base), ("x", tuned))
    }
    text = evaluation.gain_example(SimpleNamespace(summary={"policies": policies}), "x")
    one, other, gain = map(float, re.findall(r"-?\d+\.\d+", text.replace(" - (", " (")))
    assert abs(one - other - gain) < 1e-9
    assert f"{gain:.3f}" == f"{tuned - base:.3f}", "the gain that page 1 prints"
    assert ("(" in text) == (other < 0)


@pytest.mark.parametrize("kl, tokens", [(1.2349, 12), (0.0, 1), (7.005, 128)])
def test_the_kl_of_a_response_is_worked_out_and_the_printed_quotient_holds(kl, tokens):
    arrays = {"x.kl": np.array([[kl, 9.0]]), "x.tokens": np.array([[tokens, 3]])}
    text = evaluation.kl_example(SimpleNamespace(arrays=lambda: arrays), "x")
    whole, count, share = map(float, re.findall(r"\d+\.?\d*", text))
    assert count == tokens and abs(whole - kl) <= 0.005 + 1e-9
    assert abs(whole / count - share) <= 5.01e-4


def test_the_second_reward_model_is_told_with_its_accuracy_and_the_longer_answers():
    own, longer = ({"value": v, "low": v - 0.06, "high": v + 0.06} for v in (0.647, 0.666))
    run = SimpleNamespace(summary={"accuracy": own, "baselines": {"longer": {"accuracy": longer}}})
    text = evaluation.second_model_reading(run)
    assert "orders 64.7% [58.7%, 70.7%] of its own" in text and "answer, 66.6% [60.6%" in text


@pytest.mark.parametrize(("ended", "said"), [((0.01, 0.08), True), ((0.6, 0.9), False)])
def test_lengths_that_cannot_vary_are_said_to_explain_nothing(ended, said):
    policies = {name: {"ended": share} for name, share in zip("ab", ended, strict=True)}
    text = evaluation.cap_reading({"policies": policies})
    assert "are cut off" in text and ("cannot be seen" in text) == said
    assert ("92% to 99%" in text) == said


@pytest.mark.parametrize(
    ("gain", "kls", "price", "words"),
    [
        (0.3, (0.05, 0.05), 0.1, "There are none."),
        (0.05, (0.05, 0.05), 0.1, "KL 0.050 nats a token. At the end a response paid 0.60"),
        (0.3, (0.05, 0.2), 0.1, "KL 0.200 nats a token, above the band first at step 2."),
        (0.3, (0.2, 0.01), 0.1, "KL 0.010 nats a token, above the band first at step 1."),
        (0.05, (0.05, 0.05), 0.2, "deviation of 1.00: the penalty outweighs the reward."),
    ],
)
def test_of_uncertain_runs_it_is_told_what_their_logs_show(gain, kls, price, words):
    rows = [
        {"step": step, "kl": kl, "kl_weight": price, "kl_sequence": 6.0, "reward_std": 1.0}
        for step, kl in enumerate(kls, 1)
    ]
    run = SimpleNamespace(metrics=lambda: pd.DataFrame(rows))
    told = evaluation.uncertain_runs_reading(
        {"ppo-lora-1": run}, {"ppo-lora-1": {"reward": interval(gain)}}
    )
    assert words in told and (gain > 0.1 or told.startswith("* PPO, LoRA, seed 1: gain 0.05"))
    assert ("outweighs" in told) == (price == 0.2)


def test_dpo_is_told_with_its_pairs_where_it_was_trained():
    summary = {"steps": 30, "pairs": {"train": 64, "validation": 16}}
    run = SimpleNamespace(summary=summary | {"validation": {"accuracy": 0.625}})
    told = baselines.dpo_reading(SimpleNamespace(baselines=["dpo"], run=lambda stage: run))
    assert told == (
        "DPO took 30 steps on 64 pairs and then orders 62% of 16 held-out ones by its own "
        "log-ratios."
    )
    assert "not trained" in baselines.dpo_reading(SimpleNamespace(baselines=[]))


def test_cut_prompts_are_told_among_all():
    assert evaluation.cut_reading({"prompts": 3, "prompts_cut": 2}).startswith("Of 2 of the 3")


def interval(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def summary_of(against):
    """Both variants at six nats, `against` ahead of the best of 64; the second reward follows."""
    texts = {"ended": 0.5, "distinct_2": 0.4, "repetition": 0.1, "perplexity": 5.0}
    base = texts | {"ended": 0.2, "perplexity": 4.0}
    own = texts | {"kl_per_sequence": 6.0}
    best = {"n": 64, "kl_per_sequence": 3.17, "reward": interval(against)}
    best |= {"second_reward": interval(-against)}
    gain = {"second_reward": interval(against), "best_of_n": best}
    names = ("ppo-full", "ppo-lora")
    return {
        "policies": {"pretrained": base} | dict.fromkeys(names, own),
        "gains": dict.fromkeys(names, gain),
    }


@pytest.mark.parametrize(
    ("against", "verdict", "by_second"),
    [
        (0.3, "ahead of", "better"),
        (-0.3, "behind", "worse"),
        (0.05, "not to be told from", "no diff"),
    ],
)
def test_a_policy_beats_best_of_n_only_where_the_interval_says_so(against, verdict, by_second):
    text = baselines.best_of_n_reading(summary_of(against))
    assert f"PPO, full and PPO, LoRA are {verdict} it." in text
    (row, _) = baselines.best_of_n_table(summary_of(against)).to_dict("records")
    assert row["best of"] == 64 and row["KL per response"] == 6.0
    four = summary_of(against)
    four["gains"] |= {f"ppo-full-{n}": four["gains"]["ppo-full"] for n in (1, 2)}
    assert f": 4 of 4 policies are {verdict} it." in baselines.best_of_n_reading(four)
    changes = evaluation.changes_reading(summary_of(against))
    assert f"PPO, LoRA: {by_second}" in changes
    assert "perplexity 4.0 to 5.0" in changes and "answers that end 20% to 50%" in changes
    second = f"{-against:.2f} [{-against - 0.1:.2f}, {-against + 0.1:.2f}]"
    assert row["by the second model"] == second


def test_how_many_responses_and_conversations_there_are_is_told():
    text = evaluation.answers_reading({"conversations": 5, "responses_per_prompt": 4})
    assert "4 times" in text and "the 5 conversations" in text
