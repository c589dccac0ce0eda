"""Several replies to a question with ranks or scores, as the hub's data sets have them."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import replies
from rlhf_jax.data.preferences import load_preferences, posts, preference_posts
from rlhf_jax.data.prompts import load_prompts

ASKED = "Why does bread rise?"
BEST, MIDDLE, WORST = ORDER = ("Yeast makes gas.", "Heat.", "Magic.")
GRADED = ((MIDDLE, 2), (WORST, 1), (BEST, 3))  # in the order of the lists, the highest best


def items(text, grade, values=(2.0, 1.0, 3.0), **more):
    return [{text: reply, grade: v, **more} for (reply, _), v in zip(GRADED, values, strict=True)]


RANKED = (2.0, 3.0, 1.0)
SCORED = {"fine-grained_score": 4.0, "critique": "Good.", "custom_system_prompt": "Be honest."}
LISTS = {
    "Nectar": {
        "prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ",
        "answers": items("answer", "rank", RANKED, model="gpt-4"),
        "turns": 1,
        "num_responses": 3,
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    },
    "UltraFeedback": {
        "source": "evol_instruct",
        "instruction": ASKED,
        "models": ["a", "b", "c"],
        "completions": items("response", "overall_score", **SCORED),
        "correct_answers": ["None"],
    },
    "stack-exchange-preferences": {
        "qid": 1,
        "question": ASKED,
        "answers": items("text", "pm_score", (1, 0, 5), answer_id=7, selected=False),
    },
    "distilabel": {
        "instruction": ASKED,
        "generations": [reply for reply, _ in GRADED],
        "generation_models": ["a", "b", "c"],
        "ratings": ["2", "1", "5"],
    },
    "GPT-4-LLM": {
        "user_input": ASKED,
        "responses_and_scores": items("response", "score", source="opt"),
    },
    "ranks beside": {"query": ASKED, "responses": [reply for reply, _ in GRADED], "ranks": RANKED},
    "dialogues": {
        "prompt": [{"role": "user", "content": ASKED}],
        "candidates": [
            {"content": [{"role": "assistant", "content": reply}], "reward": grade}
            for reply, grade in GRADED
        ],
    },
}
ROWS = [
    {"prompt": ASKED, "response": reply, "helpfulness": grade, "verbosity": 1}
    for reply, grade in GRADED
]


def read_back(tmp_path, rows, suffix):
    path, frame = tmp_path / f"rows.{suffix}", pd.DataFrame(rows)
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded, source = load_preferences(None, str(path))
    return preference_posts(frame), posts(loaded, max_pairs_per_post=None, seed=0), source


def compared(post):
    return {(post.replies[better], post.replies[worse]) for better, worse in post.pairs}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "rows", [*([row] for row in LISTS.values()), ROWS], ids=[*LISTS, "HelpSteer2"]
)
def test_graded_replies_are_one_post_with_all_pairs(tmp_path, rows, suffix):
    *read, source = read_back(tmp_path, rows, suffix)
    for [post] in read:
        assert (post.prompt, post.turns) == (ASKED, ())
        assert {*post.replies} == {*ORDER}
        assert compared(post) == {*itertools.combinations(ORDER, 2)}
    assert source.note == ""
    [prompt], _ = load_prompts(None, str(tmp_path))
    assert prompt.text == ASKED


def test_pairs_are_those_whose_grades_differ_as_a_loop_finds_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        grades = rng.integers(0, 3, 5)
        texts = [f"Reply {i}." for i in range(5)]
        expected = {
            (texts[i], texts[j]) for i in range(5) for j in range(5) if grades[i] > grades[j]
        }
        for name, sign in (("scores", 1), ("ranks", -1)):
            row = {"prompt": "Why?", "responses": texts, name: [*map(int, sign * grades)]}
            if expected:
                [post] = preference_posts([row])
                assert compared(post) == expected and len(post.pairs) == len(expected)


def test_ties_and_replies_without_a_text_or_a_grade_are_left_out_and_counted(tmp_path):
    graded = [("a", 2), ("b", 1), ("c", 1), ("d", None), ("", 5), ("f", "N/A")]
    row = {"prompt": "Why?", "completions": [
        {"response": text, "overall_score": grade} for text, grade in graded
    ]}  # fmt: skip
    _, [post], source = read_back(tmp_path, [row, row | {"completions": None}], "jsonl")
    assert compared(post) == {("a", "b"), ("a", "c")}
    assert source.note == (
        "3 replies without a text, a rank or a score left out; "
        "1 pairs of replies of the same rank or score left out"
    )


def test_no_more_pairs_of_a_list_are_kept_than_are_asked_for():
    row = {"prompt": "Why?", "responses": list("abcdefg"), "scores": [*range(7)]}
    [whole], [some] = preference_posts([row]), preference_posts([row], max_pairs_per_post=4)
    assert len(whole.pairs) == 21 and len(some.pairs) == 4
    assert compared(some) < compared(whole)


def test_more_pairs_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(replies, "MOST_PAIRS", 20)
    row = {"prompt": "Why?", "responses": list("abcdefg"), "scores": [*range(7)]}
    with pytest.raises(UserError, match="more than 20 pairs; keep a part"):
        preference_posts([row])


def test_a_rank_that_is_empty_in_all_replies_is_none():
    listed = [item | {"rank": None} for item in items("answer", "score")]
    [post] = preference_posts([{"prompt": ASKED, "answers": listed}])
    assert compared(post) == {*itertools.combinations(ORDER, 2)}


INFO = {"id": "t3", "post": "I bake.", "title": "Bread", "subreddit": "food", "article": None}
NEWS = {"id": "c", "post": None, "title": None, "subreddit": None, "article": "It rises."}


def test_the_better_of_two_summaries_is_told_by_its_number_and_the_post_is_the_question(tmp_path):
    summaries = [{"text": " Bakes.", "policy": "sup1"}, {"text": " Rises.", "policy": "ref"}]
    rows = [
        {"info": INFO, "summaries": summaries, "choice": 1, "split": "valid1"},
        {"info": NEWS, "summaries": summaries, "choice": 0, "split": "train"},
    ]
    _, [first, second], source = read_back(tmp_path, rows, "jsonl")
    assert first.prompt == "SUBREDDIT: r/food\n\nTITLE: Bread\n\nPOST: I bake.\n\nTL;DR:"
    assert compared(first) == {("Rises.", "Bakes.")} and first.split == "validation"
    assert second.prompt == "Article:\n\nIt rises.\n\nTL;DR:"
    assert compared(second) == {("Bakes.", "Rises.")} and source.note == ""
    prompts, _ = load_prompts(None, str(tmp_path))
    assert [prompt.text for prompt in prompts] == [first.prompt, second.prompt]


def test_a_column_called_info_that_asks_nothing_is_no_question():
    dialogues = {name: f"\n\nHuman: {ASKED}\n\nAssistant: {reply}"
                 for name, reply in (("chosen", BEST), ("rejected", WORST))}  # fmt: skip
    [post] = preference_posts([dialogues | {"info": {"id": 1, "title": "Bread"}}])
    assert post.prompt == ASKED


@pytest.mark.parametrize("names", [
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("response_j", "response_k"), ("accepted", "rejected"),
])  # fmt: skip
def test_other_names_of_the_chosen_and_the_rejected_reply_are_read(names):
    row = {"instruction": ASKED, names[0]: BEST, names[1]: WORST, "chosen_rating": 1.0}
    [post] = preference_posts([row])
    assert (post.prompt, compared(post)) == (ASKED, {(BEST, WORST)})


@pytest.mark.parametrize("tie", [
    {"score_chosen": 7.0, "score_rejected": 7.0}, {"chosen_score": "3", "rejected_score": 3},
    {"chosen_rating": 4, "rejected_rating": 4.0}, {"status": "tie"},
])  # fmt: skip
def test_a_chosen_reply_that_is_scored_as_the_rejected_one_is_no_better(tie):
    """UltraFeedback's binarized pairs and those of distilabel."""
    row = {"prompt": ASKED, "chosen": BEST, "rejected": WORST}
    other = {name: None for name in tie} | {"prompt": "Why?"}
    [post] = preference_posts([row | tie, row | other])
    assert post.prompt == "Why?"


@pytest.mark.parametrize("form", ["score_{}", "{}_score", "rating_{}", "{}_rating"])
def test_chosen_replies_that_are_scored_below_the_rejected_ones_are_refused(form):
    row = {"chosen": BEST, "rejected": WORST, form.format("chosen"): 1, form.format("rejected"): 9}
    rows = [row | {"prompt": f"{i}?"} for i in range(40)]
    with pytest.raises(UserError, match="'chosen' prefers the reply with the lower score in 100%"):
        preference_posts(rows)
    right = {form.format("chosen"): 9, form.format("rejected"): 1}
    assert len(preference_posts([one | right for one in rows])) == 40


def test_every_chosen_reply_of_a_list_is_better_than_every_rejected_one():
    """RewardBench 2."""
    [post] = preference_posts(
        [{"prompt": ASKED, "chosen": [BEST, MIDDLE], "rejected": [WORST, "?"]}]
    )
    assert compared(post) == {*itertools.product((BEST, MIDDLE), (WORST, "?"))}
    assert len(post.replies) == 4


def test_rows_of_different_questions_or_contexts_are_not_compared():
    about = [row | {"context": context} for row, context in zip(ROWS, "aab", strict=True)]
    asked = [{"instruction": row.pop("prompt"), **row} for row in about]
    [post] = preference_posts(asked)
    assert compared(post) == {(MIDDLE, WORST)} and post.prompt == f"{ASKED}\n\na"
    with pytest.raises(UserError, match="no preferences in its columns, prompt, response, help"):
        preference_posts([row | {"prompt": f"{i}?"} for i, row in enumerate(ROWS)])


@pytest.mark.parametrize(("changes", "message"), [
    ({"responses": list("abc")}, r"which replies of 'responses' are better.*'rank'.*'choice'"),
    ({"responses": list("ab")}, r"which replies of 'responses' are better; its columns are prompt"),
    ({"responses": list("abc"), "scores": [1, 2]}, r"row 1: 'scores' is \[1, 2\].*as 'responses'"),
    ({"responses": ["a"] * 101, "scores": [1] * 101}, "a list of at most 100 replies"),
    ({"responses": list("ab"), "choice": 2}, "'choice' is 2, it must be '0', '1' or 'tie'"),
    ({"chosen": ["a"] * 101, "rejected": "b"}, "'chosen' is .*at most 100 texts"),
    ({"responses": list("abc"), "scores": [1, 1, 1]},
     "same rank or score left out.* in its columns, prompt, responses, scores"),
])  # fmt: skip
def test_lists_that_tell_no_order_are_refused_with_what_would_do(changes, message):
    with pytest.raises(UserError, match=message):
        preference_posts([{"prompt": ASKED, **changes}])
