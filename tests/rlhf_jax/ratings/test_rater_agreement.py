import numpy as np
import pytest

from rlhf_jax.ratings import rater_agreement
from rlhf_jax.ratings.store import CRITERIA, Rating, response_hash

MODELS = ("pretrained", "PPO, full", "PPO, LoRA")
REWARDS = {"pretrained": 0.0, "PPO, full": 1.0, "PPO, LoRA": -1.0}
RESPONSES = [
    {
        "prompt_id": i, "prompt": f"question {i}", "model": model,
        "response": f"{model} says {i}", "reward": REWARDS[model],
    }
    for i in range(3)
    for model in MODELS
]  # fmt: skip


def rating(prompt_id=0, model="pretrained", rater="Anna", value=3, **given):
    key = response_hash(f"question {prompt_id}", f"{model} says {prompt_id}")
    scores = dict.fromkeys(CRITERIA, value) | given
    return Rating(response_hash=key, rater=rater, rater_kind="person", **scores)


def ratings(**by_model):
    """Ratings of the three prompts by one rater, e.g. pretrained=(3, 3, 3)."""
    return [
        rating(i, model, value=value)
        for model, values in by_model.items()
        for i, value in enumerate(values)
    ]


def test_kappa_equals_its_definition():
    random = np.random.default_rng(0)
    one, other = random.choice([1, 2, 5], (2, 40))  # a distance of scores, not of ranks
    other = np.where(random.random(40) < 0.6, one, other)
    disagreement = np.mean((one - other) ** 2)
    by_chance = np.mean((one[:, None] - other[None, :]) ** 2)
    assert rater_agreement.weighted_kappa(one, other) == pytest.approx(1 - disagreement / by_chance)


def test_agreement_is_of_responses_that_both_have_rated():
    given = [rating(i, value=v) for i, v in enumerate((1, 3, 5))]
    given += [rating(i, rater="Ben", value=v, coherence=4) for i, v in enumerate((1, 3))]
    given += [rating(model="PPO, LoRA", rater="Cleo")]
    table = rater_agreement.rater_agreement(given).set_index("raters")
    assert dict(table["responses"]) == {"Anna, Ben": 2, "Anna, Cleo": 0, "Ben, Cleo": 0}
    assert table["relevance"]["Anna, Ben"] == 1
    assert table["coherence"]["Anna, Ben"] == 0
    assert 0 < table["all criteria"]["Anna, Ben"] < 1
    assert np.isnan(table["relevance"]["Anna, Cleo"])


def test_comparison_counts_prompts_and_says_what_so_few_cannot_show():
    given = ratings(**{"pretrained": (3, 3, 3), "PPO, full": (4, 3, 2), "PPO, LoRA": (1, 1, 1)})
    text = rater_agreement.reading(RESPONSES, given)
    assert "3.00 for pretrained; 3.00 for PPO, full; 1.00 for PPO, LoRA" in text
    assert "PPO, full is rated above pretrained on 1 and below on 1" in text
    assert "PPO, LoRA is rated above pretrained on 0 and below on 3" in text
    assert "a fair coin in 25% of cases" in text  # both tails: 2 of 2 ** 3 equal signs


def test_comparison_names_the_criterion_in_which_models_differ_most():
    given = [rating(model=MODELS[0], value=3), rating(model=MODELS[1], value=3, relevance=5)]
    text = rater_agreement.reading(RESPONSES, given)
    assert "farthest apart in relevance: 3.0 (pretrained) to 5.0 (PPO, full)" in text
    assert "Of 1 prompts" not in text and "Of 1 prompt," in text


def test_comparison_says_nothing_before_anybody_has_rated():
    assert "nothing to compare" in rater_agreement.reading(RESPONSES, [])


@pytest.mark.parametrize(
    ("by_model", "told"),
    [
        # rewards order the models: LoRA below pretrained below full, on every prompt
        (
            {"pretrained": (3,), "PPO, full": (4,), "PPO, LoRA": (2,)},
            "Of 3 pairs of responses to one prompt, ties aside, the reward model orders 3 as",
        ),
        (
            {"pretrained": (3,), "PPO, full": (2,), "PPO, LoRA": (4,)},
            "Of 3 pairs of responses to one prompt, ties aside, the reward model orders 0 as",
        ),
        (
            {"pretrained": (3, 3), "PPO, full": (3, 5)},
            "Of 1 pairs of responses to one prompt, ties aside, the reward model orders 1 as",
        ),
        ({"pretrained": (3,), "PPO, full": (3,)}, "No two responses"),
    ],
)
def test_the_order_of_the_reward_model_is_counted_within_prompts(by_model, told):
    assert told in rater_agreement.reading(RESPONSES, ratings(**by_model))
