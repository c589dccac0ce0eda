import dataclasses
import itertools

import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import splits
from rlhf_jax.data.preferences import Post
from rlhf_jax.data.prompts import Prompt

FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.1, "second_reward": 0.1}


def post(number, *, prompt=None, replies=None, **fields):
    return Post(
        post_id=f"p{number}",
        **{"domain": "baking" if number % 4 else "physics"} | fields,
        prompt=prompt or f"question {number}",
        replies=replies or (f"good answer {number}", f"bad answer {number}"),
        scores=(2, 1),
        pairs=((0, 1),),
    )


def side(parts, wanted):
    [name] = [name for name, part in parts.items() if wanted in part]
    return name


def divided(posts, seed=0, fractions=FRACTIONS):
    return splits.split_posts(posts, fractions=fractions, seed=seed)


def test_parts_hold_every_post_once_in_proportion_in_every_domain():
    posts = [post(i) for i in range(400)]
    parts = divided(posts)
    ids = [p.post_id for p in itertools.chain(*parts.values())]
    assert sorted(ids) == sorted(p.post_id for p in posts)
    for name, fraction in FRACTIONS.items():
        for domain, total in (("baking", 300), ("physics", 100)):
            count = sum(p.domain == domain for p in parts[name])
            assert abs(count - fraction * total) <= 1


@pytest.mark.parametrize("domains", [200, 67])
def test_domains_of_few_posts_are_divided_as_one(domains):
    posts = [dataclasses.replace(post(i), domain=f"d{i % domains}") for i in range(200)]
    parts = divided(posts)
    for name, fraction in FRACTIONS.items():
        assert abs(len(parts[name]) - fraction * 200) <= 1


def test_posts_that_share_a_text_stay_on_one_side():
    posts = [post(i) for i in range(40)]
    for n in range(10):
        shared = {"prompt": f" Shared   QUESTION {n}"}, {"replies": ("x", f"Shared reply {n}")}
        posts += [
            post(100 + 4 * n + 0, **shared[0]),
            post(100 + 4 * n + 1, prompt=f"shared question {n}"),
        ]
        posts += [post(100 + 4 * n + 2, replies=(f"shared reply {n}", f"y{n}"))]
        posts += [post(100 + 4 * n + 3, replies=(f"z{n}", f"Shared reply {n}"))]
    parts = divided(posts)
    for n in range(10):
        a, b, c, d = posts[40 + 4 * n : 44 + 4 * n]
        assert side(parts, a) == side(parts, b)
        assert side(parts, c) == side(parts, d)
    assert splits.overlap(parts) == 0


def test_overlap_counts_texts_on_two_sides():
    parts = {"train": [post(1)], "test": [post(2, prompt="Question  1"), post(3)]}
    assert splits.overlap(parts) == 1
    assert splits.overlap({"train": [post(1)], "test": [post(1)]}) == 4


def test_posts_linked_through_others_are_one_group():
    chain = [post(i, replies=(f"reply {i}", f"reply {i + 1}")) for i in range(5)]
    assert [len(group) for group in splits.linked([*chain, post(9)])] == [5, 1]


def test_division_depends_on_the_seed_only():
    posts = [post(i) for i in range(60)]
    assert divided(posts) == divided(posts)
    assert divided(posts) != divided(posts, seed=1)


def test_a_part_that_was_renamed_holds_the_posts_it_held_in_their_order():
    posts, older = [post(i) for i in range(60)], {"train": 0.8, "gold": 0.2}
    newer = {"train": 0.8, "second_reward": 0.2}
    assert list(divided(posts, fractions=newer).values()) == [
        *divided(posts, fractions=older).values()
    ]


def test_prefix_of_a_part_is_a_sample_of_it():
    train = divided([post(i) for i in range(400)])["train"]
    assert 5 < sum(p.domain == "physics" for p in train[:60]) < 25
    ids = [int(p.post_id[1:]) for p in train]
    assert 100 < sum(ids[:60]) / 60 < 300


def test_official_splits_are_kept_and_the_rest_is_divided():
    names = ["train"] * 80 + ["validation"] * 10 + ["test"] * 10
    posts = [post(i, split=name) for i, name in enumerate(names)]
    leak = post(200, split="train", prompt="question 95")  # a test question
    parts = divided([*posts, leak])
    assert {p.post_id for p in parts["test"]} == {p.post_id for p in posts[90:]}
    assert {p.post_id for p in parts["validation"]} == {p.post_id for p in posts[80:90]}
    assert len(parts["train"]) + len(parts["second_reward"]) == 80
    assert abs(len(parts["second_reward"]) - 10) <= 2
    assert leak not in parts["train"] + parts["second_reward"]


def test_impossible_divisions_are_errors():
    with pytest.raises(UserError, match="sum to other than 1"):
        divided([post(1)], fractions={"train": 0.5, "test": 0.4})
    with pytest.raises(UserError, match="part 'train' .*empty.*groups that share"):
        divided([])


def prompts(trees, size):
    return [
        Prompt(prompt_id=f"{t}-{i}", tree_id=f"t{t}", text=f"text {t} {i}", origin="messages")
        for t in range(trees)
        for i in range(size)
    ]


@pytest.mark.parametrize(("train", "evaluation"), [(20, 10), (20, 11), (33, 1)])
def test_evaluation_prompts_come_from_unseen_conversations(train, evaluation):
    seen, unseen = splits.split_prompts(prompts(12, 3), train=train, evaluation=evaluation, seed=0)
    assert len(unseen) == evaluation
    assert len(seen) == train
    assert not {p.tree_id for p in seen} & {p.tree_id for p in unseen}
    assert len({p.text for p in seen + unseen}) == len(seen) + len(unseen)


def test_prompt_draw_depends_on_the_seed_only():
    def draw(seed):
        return splits.split_prompts(prompts(12, 3), train=9, evaluation=9, seed=seed)

    assert draw(0) == draw(0) != draw(1)


def test_more_prompts_to_evaluate_leave_those_to_train_on_as_they_are():
    few, _ = splits.split_prompts(prompts(12, 3), train=12, evaluation=6, seed=0)
    many, unseen = splits.split_prompts(prompts(12, 3), train=12, evaluation=20, seed=0)
    assert few == many and not {p.tree_id for p in many} & {p.tree_id for p in unseen}


def test_questions_of_the_preference_data_are_evaluated_last():
    added = [
        Prompt(prompt_id=f"q{i}", tree_id=f"q{i}", text=f"q{i}", origin="preferences")
        for i in range(30)
    ]
    seen, unseen = splits.split_prompts([*added, *prompts(6, 2)], train=30, evaluation=10, seed=0)
    assert {p.origin for p in unseen} == {"messages"}


def test_too_few_prompts_are_an_error():
    for train, evaluation in ((1, 37), (1, 36), (27, 10)):
        with pytest.raises(UserError, match="36 prompts in 12 conversations are too few"):
            splits.split_prompts(prompts(12, 3), train=train, evaluation=evaluation, seed=0)


@pytest.mark.parametrize("official", [True, False])
def test_a_reply_of_many_posts_costs_its_pairs_and_no_post(official):
    """Every post is thanked; where a part is held out, the others lose the thanks alone."""
    posts = []
    for i in range(300):
        replies = (f"good {i}", f"bad {i}", " thanks! " if i % 2 else "Thanks!")
        made = post(i, replies=replies, split=("test" if i % 10 == 0 else "train") * official)
        posts.append(dataclasses.replace(made, scores=(2, 1, 0), pairs=((0, 1), (0, 2))))
    parts = divided(posts)
    assert splits.overlap(parts) == 0
    thanked = {
        name: sum("thanks" in p.replies[-1].lower() for p in part) for name, part in parts.items()
    }
    assert thanked == {name: len(parts[name]) * (name == "test") for name in parts}
    assert all(len(parts[name]) >= 25 for name in FRACTIONS)
    count = 300 - len(parts["test"])
    assert splits.lost(posts, parts) == {"posts": 0, "pairs": count, "replies": count}
    assert {p.pairs for p in parts["train"]} == {((0, 1),)}


def test_a_post_whose_only_pair_needs_a_held_out_reply_is_lost_and_counted():
    posts = [post(i, split="train") for i in range(50)]
    posts += [post(100 + i, split="test", replies=(f"good answer {i}", "x")) for i in range(10)]
    parts = divided(posts)
    assert splits.lost(posts, parts) == {"posts": 10, "pairs": 10, "replies": 20}
