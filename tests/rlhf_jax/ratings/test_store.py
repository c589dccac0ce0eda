import dataclasses
import json

import pytest

from experiment_runs.errors import UserError
from rlhf_jax.ratings import questionnaire, store
from rlhf_jax.ratings.plain_text import block, printable
from rlhf_jax.ratings.store import (
    CRITERIA,
    Rating,
    load_ratings,
    pending,
    response_hash,
    save_rating,
)

MODELS = ("pretrained", "ppo-full", "ppo-lora")
RESPONSES = [
    {"prompt_id": i, "prompt": f"question {i}", "model": model, "response": f"{model} says {i}"}
    for i in range(3)
    for model in MODELS
]
FIRST = response_hash("question 0", "pretrained says 0")


def scores(value=3, **others):
    return dict.fromkeys(CRITERIA, value) | others


def row(**changes):
    fields = {"response_hash": FIRST, "rater": "Anna", "rater_kind": "person", **scores()}
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def rating(prompt_id=0, model="pretrained", rater="Anna", kind="person", **given):
    key = response_hash(f"question {prompt_id}", f"{model} says {prompt_id}")
    return Rating(response_hash=key, rater=rater, rater_kind=kind, **scores(**given))


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_hash_tells_every_other_text_apart():
    others = [("question 0", "pretrained says 0 "), ("question 0pre", "trained says 0"), ("", "")]
    assert len({FIRST, *(response_hash(*texts) for texts in others)}) == 4
    assert response_hash("a", "\ud800 \u2028") != response_hash("a", "? ")


def test_saved_ratings_are_loaded_as_given(tmp_path):
    path = tmp_path / "ratings.jsonl"
    assert load_ratings(path) == []
    given = scores(2, relevance=5)
    save_rating(path, FIRST, "Zoë", "ai", given, note="two\nlines\u2028and more")
    [loaded] = load_ratings(path, RESPONSES)
    assert {c: getattr(loaded, c) for c in CRITERIA} == given
    assert (loaded.rater, loaded.rater_kind, loaded.note) == ("Zoë", "ai", "two lines and more")
    assert loaded.time


def test_file_that_an_editor_left_without_a_last_line_end_grows_by_a_whole_line(tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_text(json.dumps(row()))
    save_rating(path, FIRST, "Ben", "person", scores())
    assert [r.rater for r in load_ratings(path)] == ["Anna", "Ben"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(response_hash="0" * 16), "no response here has the hash '0000000000000000'"),
        (row(coherence=0), "coherence is 0; a score is an integer from 1 to 5"),
        (row(relevance=6), "relevance is 6;"),
        (row(helpfulness=3.5), "helpfulness is 3.5;"),
        (row(helpfulness="3"), "helpfulness is '3';"),
        (row(helpfulness=True), "helpfulness is True;"),
        (row(completeness=...), "completeness is missing"),
        (row(rater=...), "rater is missing"),
        (row(rater=" "), "rater is missing"),
        (row(rater=7), "rater is 7; write a text"),
        (row(response_hash=[1]), "response_hash is [1]; write a text"),
        (row(rater_kind="robot"), "rater_kind is 'robot'; write 'person' or 'ai'"),
        (row(mood=3), "mood is unknown"),
        (row(rater="Ben"), "Ben has rated this response in line 1"),
        ([1, 2], "not an object"),
        ('{"rater": ', "not JSON"),
    ],
)
def test_bad_row_is_refused_with_line_and_reason(tmp_path, bad, reason):
    path = write(tmp_path / "ratings.jsonl", row(rater="Ben"), bad)
    with pytest.raises(UserError) as refused:
        load_ratings(path, RESPONSES)
    assert str(refused.value).startswith(f"{path}, line 2: ")
    assert reason in str(refused.value)


def test_rating_of_another_text_is_never_shown():
    changed = [r | {"response": r["response"] + "!"} for r in RESPONSES]
    table = store.rating_table(changed, [rating()])
    assert list(table["model"]) == list(MODELS)
    assert table[["coherence", "mean"]].isna().all(axis=None)


def test_table_shows_means_over_raters():
    given = [rating(value=2), rating(rater="Ben", value=4, coherence=5)]
    given += [rating(model="ppo-lora", rater="model X", kind="ai", value=1), rating(prompt_id=1)]
    table = store.rating_table(RESPONSES[:3], given)
    assert list(table["model"]) == list(MODELS)
    assert list(table["mean"].isna()) == [False, True, False]
    assert table["coherence"][0] == 3.5
    assert table["mean"][0] == pytest.approx((3.5 + 4 * 3) / 5)
    assert table["hallucination / toxicity"][2] == 1


def test_table_of_all_prompts_takes_those_that_are_rated():
    given = [rating(prompt_id=i, value=i + 2) for i in range(2)]
    assert store.rating_table(RESPONSES, given)["mean"][0] == 2.5


def test_state_says_who_rated_and_never_calls_an_ai_system_a_person():
    assert "None of the 9 responses" in store.rating_state(RESPONSES, [])
    person, system = rating(), rating(rater="model X", kind="ai")
    assert "by Anna (a person)." in store.rating_state(RESPONSES, [person])
    by_system = store.rating_state(RESPONSES, [system])
    assert "1 of the 9" in by_system and "by model X (an AI system). These are an AI" in by_system
    assert "not a person's" in by_system
    both = store.rating_state(RESPONSES, [person, system])
    assert "Anna (a person), model X (an AI system)" in both and "together" in both


def test_the_rubric_that_is_shown_is_the_one_that_raters_read(capsys, monkeypatch):
    shown = [x for row in store.rubric().itertuples(index=False) for x in row[1:]]
    assert len(shown) == 15
    monkeypatch.setattr("builtins.input", lambda prompt: "1")
    questionnaire.ask_scores()
    asked = capsys.readouterr().out
    page = "".join(questionnaire.fieldset(criterion) for criterion in CRITERIA)
    assert all(meaning in asked and meaning in page for meaning in shown)


def test_order_is_random_by_rater_and_the_same_when_resumed(tmp_path):
    path = tmp_path / "ratings.jsonl"
    anna, ben = (list(pending(RESPONSES, path, rater)) for rater in ("Anna", "Ben"))
    assert sorted(anna) == sorted(ben) == sorted(store.by_hash(RESPONSES))
    assert anna != ben
    save_rating(path, anna[0], "Anna", "person", scores())
    assert list(pending(RESPONSES[::-1], path, "Anna")) == anna[1:]
    assert list(pending(RESPONSES, path, "Ben")) == ben


def test_terminal_is_blind_resumes_and_lets_the_rater_go_back(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ratings.jsonl"
    rows = [r | {"response": f"answer {i}"} for i, r in enumerate(RESPONSES)]
    keys = list(pending(rows, path, "Anna"))

    def answer(*typed):
        left = iter(typed)
        monkeypatch.setattr("builtins.input", lambda prompt: next(left))
        questionnaire.rate_in_terminal(rows, path, "Anna")
        assert next(left, None) is None
        return capsys.readouterr().out

    shown = answer("1", "b", "2", "x", "9", "2", "3", "4", "5", "fine", "3", "q")
    assert not any(model in shown for model in MODELS)
    [saved] = load_ratings(path, rows)
    assert [getattr(saved, c) for c in CRITERIA] == [2, 2, 3, 4, 5]
    assert (saved.response_hash, saved.note, saved.rater_kind) == (keys[0], "fine", "person")
    answer(*(["4"] * 5 + [""]) * 8)
    assert [r.response_hash for r in load_ratings(path, rows)] == keys
    assert "All 9 responses are rated" in answer()


def test_end_of_input_stops_without_losing_what_was_rated(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ratings.jsonl"
    left = iter(["1"] * 5 + [""])

    def type_in(prompt):
        if (typed := next(left, None)) is None:
            raise EOFError
        return typed

    monkeypatch.setattr("builtins.input", type_in)
    questionnaire.rate_in_terminal(RESPONSES, path, "Anna")
    assert len(load_ratings(path)) == 1
    assert "8 left" in capsys.readouterr().out


def test_terminal_shows_control_characters_as_text():
    assert printable("\x1b[2J\u202eabc\r\n\tx\rz") == "⟨U+001B⟩[2J⟨U+202E⟩abc\n\tx⟨U+000D⟩z"
    assert max(map(len, block("x" * 20_000).split("\n"))) <= 100
    assert block("x" * 20_000).count("x") == 20_000
    assert block(" \n") == "  (empty)"


def test_every_field_of_a_rating_is_in_the_file(tmp_path):
    save_rating(tmp_path / "r.jsonl", FIRST, "Anna", "person", scores())
    stored = json.loads((tmp_path / "r.jsonl").read_text())
    assert set(stored) == {field.name for field in dataclasses.fields(Rating)}
