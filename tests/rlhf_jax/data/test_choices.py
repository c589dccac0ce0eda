"""Two replies and a column that tells which one is better, as the hub's data sets have them."""

import json

import pandas as pd
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data.preferences import load_preferences, preference_posts

ASKED = "Why does bread rise?"
GOOD, BAD = "Yeast makes gas.", "Magic."


def dialogue(reply):
    return [{"role": "user", "content": ASKED}, {"role": "assistant", "content": reply}]


ZERO_ONE = {"prompt": ASKED, "response_0": BAD, "response_1": GOOD}
A_B = {"prompt": ASKED, "response_a": BAD, "response_b": GOOD}
ARENA = {"conversation_a": dialogue(BAD), "conversation_b": dialogue(GOOD)}
KAGGLE = {"prompt": json.dumps([ASKED])} | {
    f"response_{mark}": json.dumps([reply]) for mark, reply in (("a", BAD), ("b", GOOD))
}
WEBGPT = {"question": {"dataset": "eli5", "id": "1", "full_text": ASKED}, "answer_0": BAD}
HELPSTEER3 = {"context": dialogue("")[:1], "response1": BAD, "response2": GOOD}
SETS = {
    "PKU-SafeRLHF": ZERO_ONE | {"better_response_id": 1, "safer_response_id": 0},
    "chatbot_arena_conversations": ARENA | {"winner": "model_b"},
    "arena-human-preference-55k": KAGGLE
    | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
    "webgpt_comparisons": WEBGPT | {"answer_1": GOOD, "score_0": -0.5, "score_1": 0.5},
    "HelpSteer2-preference": {"prompt": ASKED, "response_1": BAD, "response_2": GOOD}
    | {"preference_strength": 2},
    "HelpSteer3": HELPSTEER3 | {"overall_preference": 1, "domain": "general"},
    "alpaca_farm": {"instruction": ASKED, "input": "", "output_1": BAD, "output_2": GOOD}
    | {"preference": 2},
    "letters": A_B | {"preference": "B"},
    "names of columns": A_B | {"label": "response_b"},
    "capital letters": {"query": ASKED, "Answer_A": 0, "answer_A": BAD, "answer_B": GOOD}
    | {"winner": "Answer B"},
    "numbers as texts": ZERO_ONE | {"label": "1.0"},
    "models": A_B | {"model_a": "gpt-4", "model_b": "llama", "winner": "llama"},
    "completions": {"history": ASKED, "completion_a": BAD, "completion_b": GOOD, "choice": "b"},
    "names in chosen and rejected": A_B | {"chosen": "response_b", "rejected": "response_a"},
    "the replies beside them": A_B | {"chosen": GOOD, "rejected": BAD, "label": 0},
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", SETS.values(), ids=SETS)
def test_the_reply_that_a_column_names_is_the_chosen_one(tmp_path, row, suffix):
    path, frame = tmp_path / f"pairs.{suffix}", pd.DataFrame([row])
    frame.to_parquet(path) if suffix == "parquet" else path.write_text(json.dumps(row))
    loaded, source = load_preferences(None, str(path))
    for [post] in (preference_posts(loaded), preference_posts(frame)):
        assert (post.prompt, post.replies, post.pairs) == (ASKED, (GOOD, BAD), ((0, 1),))
    assert source.note == ""


def test_the_other_reply_is_the_chosen_one_where_the_column_says_the_opposite():
    opposite = {
        "better_response_id": 0, "winner": "model_a", "preference": 1, "overall_preference": -3,
        "preference_strength": -1, "winner_model_a": 1, "winner_model_b": 0, "score_0": 0.5,
        "score_1": -0.5,
    }  # fmt: skip
    for name in (*list(SETS)[:7],):
        [post] = preference_posts(
            [SETS[name] | {k: v for k, v in opposite.items() if k in SETS[name]}]
        )
        assert (post.replies, post.pairs) == ((BAD, GOOD), ((0, 1),)), name


@pytest.mark.parametrize(
    "tie",
    [
        ARENA | {"winner": "tie (bothbad)"},
        ARENA | {"winner": "both_bad"},
        KAGGLE | {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        HELPSTEER3 | {"overall_preference": 0},
        WEBGPT | {"answer_1": GOOD, "score_0": 0.0, "score_1": 0.0},
        ZERO_ONE | {"better_response_id": None},
    ],
)
def test_ties_are_left_out_and_counted(tmp_path, tie):
    others = {key: value for key, value in next(
        row for row in SETS.values() if {*tie} <= {*row}
    ).items() if key in tie}  # fmt: skip
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([tie, others, tie]))
    frame, source = load_preferences(None, str(path))
    assert len(frame) == 1 and source.note == "2 ties and rows without a choice left out"
    with pytest.raises(UserError, match="1 ties and rows without a choice"):
        preference_posts([tie])


def test_questions_of_several_turns_that_are_printed_are_read_as_dialogues():
    row = KAGGLE | {
        "prompt": json.dumps(["Hi", ASKED]), "response_a": json.dumps(["Hello", BAD]),
        "response_b": '["Hello", "Yeast \\ud83d makes gas."]', "winner_model_a": 1,
        "winner_model_b": 0,
    }  # fmt: skip
    [post] = preference_posts([row])
    assert post.turns == (("user", "Hi"), ("assistant", "Hello"), ("user", ASKED))
    assert post.replies == (BAD, "Yeast ? makes gas.")


@pytest.mark.parametrize(
    "row, message",
    [
        (A_B | {"winner": 1}, r"row 1: 'winner' is 1.*'a', 'b' or 'tie'"),
        (ZERO_ONE | {"better_response_id": 2}, "'0', '1' or 'tie'"),
        (A_B | {"winner_model_a": 0.3, "winner_model_b": 0.7}, "'winner_model_a' is 0.3"),
        (A_B | {"score_a": 3, "score_b": 4}, "score_a, score_b. Add 'winner' with 'a', 'b'"),
        (ZERO_ONE, "prompt, response_0, response_1. Add 'winner' with '0', '1' or 'tie'"),
        ({"instruction": ASKED, "output": GOOD}, "'response_b' beside a 'prompt'"),
    ],
)
def test_what_states_no_choice_is_refused_with_what_would_do(row, message):
    with pytest.raises(UserError, match=message):
        preference_posts([row])


@pytest.mark.parametrize("name", ["preference_strength", "overall_preference"])
def test_a_strength_on_a_scale_without_a_middle_of_zero_is_refused(name):
    """A scale from 1 to 7 would make every second reply the better one."""
    row = {"response_1": BAD, "response_2": GOOD}
    rows = [row | {"prompt": f"{i}?", name: 1 + i % 7} for i in range(40)]
    with pytest.raises(UserError, match=f"'{name}' runs from 1 to 7; it must be below 0 where"):
        preference_posts(rows)
    for one in rows:
        one[name] -= 4
    assert len(preference_posts(rows)) > 20


def test_choices_that_contradict_the_scores_beside_them_are_refused():
    rows = [A_B | {"prompt": f"{i}?", "winner": "a", "score_a": 1, "score_b": 9} for i in range(40)]
    with pytest.raises(UserError, match="'winner' prefers the reply with the lower score in 100%"):
        preference_posts(rows)
    assert len(preference_posts([row | {"winner": "b"} for row in rows])) == 40
    assert len(preference_posts(rows[:10])) == 10  # too few to tell
