import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import hub, preferences, tables
from rlhf_jax.data.prompts import load_prompts, top_up

PAIR = {
    "post_id": "p1",
    "domain": "baking_train",
    "history": "Why does bread rise?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "score_A": 3,
    "score_B": 12,
    "human_ref_A": "Magic.",
    "human_ref_B": "Yeast makes gas.",
    "labels": 0,
}
MESSAGE = {
    "message_id": "m1",
    "parent_id": None,
    "message_tree_id": "t1",
    "text": "Hello, who are you?",
    "role": "prompter",
    "lang": "en",
    "deleted": False,
}


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def pairs_from(tmp_path, *changes, name="pairs"):
    write(tmp_path / "shp", name, [PAIR | change for change in changes])
    return preferences.load_preferences(tmp_path)


def prompts_from(tmp_path, *changes, **options):
    write(tmp_path / "oasst", "messages", [MESSAGE | change for change in changes])
    return load_prompts(tmp_path, **options)


def posts_of(frame, **options):
    return preferences.posts(frame, **{"max_pairs_per_post": None, "seed": 0} | options)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no cache")
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


def test_local_pairs_are_read_and_their_source_is_stated(tmp_path):
    frame, origin = pairs_from(tmp_path, {}, {"post_id": "p2"})
    assert (origin.kind, origin.rows, origin.name) == ("local", 2, "pairs.jsonl.gz")
    assert list(frame["score_ratio"]) == [4, 4]
    assert "split" not in frame
    assert origin.fingerprint != pairs_from(tmp_path, {}, {"post_id": "p3"})[1].fingerprint


def test_votes_written_as_text_are_numbers(tmp_path):
    frame, _ = pairs_from(tmp_path, {"score_A": "3", "score_B": "12"})
    assert list(frame["score_ratio"]) == [4]


def test_score_ratio_of_the_file_is_kept(tmp_path):
    frame, _ = pairs_from(tmp_path, {"score_ratio": 7.5})
    assert list(frame["score_ratio"]) == [7.5]


def test_file_names_of_the_official_splits_are_kept_as_splits(tmp_path):
    pairs_from(tmp_path, {}, name="train")
    frame, _ = pairs_from(tmp_path, {"post_id": "p2"}, name="test")
    assert dict(zip(frame["post_id"], frame["split"], strict=True)) == {"p1": "train", "p2": "test"}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("labels", 2, "1 where A is preferred"),
        ("labels", None, "1 where A is preferred"),
        ("labels", "A", "1 where A is preferred"),
        ("human_ref_A", ["a", "list"], "a text"),
        ("history", 7, "a text"),
        ("score_B", "many", "a number of votes"),
        ("score_A", float("inf"), "a number of votes"),
        ("post_id", None, "the identifier"),
        ("post_id", ["p"], "the identifier"),
        ("score_A", 10**400, "a number of votes"),
        ("score_A", True, "a number of votes"),
        ("score_B", [3], "a number of votes"),
        ("score_B", "x" * 10**6, "a number of votes"),
        ("human_ref_A", ["Magic."], "a text"),
        ("split", ["train"], "a text"),
        ("score_ratio", {"of": 2}, "a number"),
        ("labels", {"A": 1}, "1 where A is preferred"),
    ],
)
def test_unusable_value_is_named_with_file_line_and_remedy(tmp_path, field, value, expected):
    with pytest.raises(UserError, match=rf"gz, line 2: '{field}' is .*must be {expected}.*remove"):
        pairs_from(tmp_path, {}, {field: value}, {})


def test_labels_that_contradict_nearly_all_votes_are_refused(tmp_path):
    """In SHP a label is 1 where A is preferred; other data count from the other side."""
    rows = [{"post_id": f"p{i}", "labels": 1} for i in range(30)]  # B has more votes
    with pytest.raises(
        UserError, match="'labels' .*prefers the reply with the lower score in 100% of"
    ):
        pairs_from(tmp_path, *rows)
    half = [row | {"labels": i % 2} for i, row in enumerate(rows)]
    assert len(pairs_from(tmp_path, *half)[0]) == 30


def test_votes_below_zero_are_said(tmp_path):
    _, source = pairs_from(tmp_path, {"score_A": -3}, {"post_id": "p2"})
    assert "1 pairs with votes below zero" in source.note


def test_halves_of_surrogate_pairs_inside_dialogues_become_question_marks(tmp_path):
    said = [{"role": "user", "content": "why \ud83d"}, {"role": "assistant", "content": "x\ud800"}]
    (tmp_path / "shp").mkdir()
    row = {"chosen": said, "rejected": [said[0], {"role": "assistant", "content": "y"}]}
    (tmp_path / "shp" / "pairs.jsonl").write_text(json.dumps(row))
    frame, _ = preferences.load_preferences(tmp_path)
    assert frame[["history", "human_ref_A"]].iloc[0].tolist() == ["why ?", "x?"]


def test_identifiers_of_messages_that_are_lists_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: 'message_id' is .*the identifier of the message"):
        prompts_from(tmp_path, {"message_id": ["m"]})


def test_renamed_column_is_an_error(tmp_path):
    row = {key.replace("labels", "label"): value for key, value in PAIR.items()}
    write(tmp_path / "shp", "pairs", [row])
    needed = r"pairs\.jsonl\.gz: no preferences in its columns, .*label\. .*chosen.*human_ref_A"
    with pytest.raises(UserError, match=needed):
        preferences.load_preferences(tmp_path)


def test_nothing_stands_in_for_a_local_copy_that_is_not_there(tmp_path, offline):
    for load in (preferences.load_preferences, load_prompts):
        with pytest.raises(UserError, match="no data file.*shp/.*oasst/"):
            load(tmp_path)


def test_hub_keeps_its_splits_and_leaves_out_empty_texts(tmp_path, offline, monkeypatch):
    (tmp_path / "no cache" / "stanfordnlp___shp").mkdir(parents=True)
    rows = [PAIR | {"score_ratio": 4.0}, PAIR | {"score_ratio": 4.0, "human_ref_A": ""}]
    parts = {
        "train": datasets.Dataset.from_list(rows),
        "test": datasets.Dataset.from_list([row | {"domain": "baking_test"} for row in rows]),
    }
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or parts
    )
    frame, origin = preferences.load_preferences(None)
    assert asked == [(("stanfordnlp/SHP",), {})]
    assert list(frame["split"]) == ["train", "test"]
    assert set(frame["domain"]) == {"baking"}
    assert (origin.kind, origin.name) == ("hub", "stanfordnlp/SHP")
    assert origin.note == "2 rows without a question or an answer left out"


def test_stand_in_is_used_and_named_when_the_hub_is_out_of_reach(offline):
    frame, origin = preferences.load_preferences(None)
    prompts, prompts_origin = load_prompts(None)
    assert origin.kind == prompts_origin.kind == "stand-in"
    assert origin.rows == len(frame) and prompts_origin.rows == len(prompts)
    assert f"numpy {np.__version__}" in origin.note
    asked = {tables.normalised(text) for text in frame["history"]}
    assert not asked & {tables.normalised(prompt.text) for prompt in prompts}


def test_chosen_reply_is_a_exactly_where_the_label_is_one(tmp_path):
    frame, _ = pairs_from(tmp_path, {"labels": 1}, {"post_id": "p2", "labels": 0})
    for post, chosen in zip(posts_of(frame), ["Magic.", "Yeast makes gas."], strict=True):
        [(better, worse)] = post.pairs
        assert post.replies[better] == chosen
        assert {post.replies[better], post.replies[worse]} == {"Magic.", "Yeast makes gas."}
        assert dict(zip(post.replies, post.scores, strict=True))["Magic."] == 3


def test_replies_of_a_post_are_distinct_and_all_used(tmp_path):
    third = {"human_ref_A": "Steam. ", "score_A": 5}
    frame, _ = pairs_from(tmp_path, {}, third, {})
    [post] = posts_of(frame)
    assert sorted(post.replies) == ["Magic.", "Steam.", "Yeast makes gas."]
    assert len(post.pairs) == 2
    assert {i for pair in post.pairs for i in pair} == {0, 1, 2}


def test_comparisons_that_say_nothing_are_left_out(tmp_path):
    both_ways = [{}, {"labels": 1}]
    with_itself = {"post_id": "p2", "human_ref_B": "Magic."}
    frame, _ = pairs_from(tmp_path, *both_ways, with_itself, {"post_id": "p3"})
    assert [post.post_id for post in posts_of(frame)] == ["p3"]


def many(tmp_path, replies=8):
    changes = [
        {"human_ref_A": f"reply {i}", "score_A": 10 + i, "human_ref_B": f"reply {j}", "score_B": 5}
        for i in range(replies)
        for j in range(i)
    ]
    return pairs_from(tmp_path, *[c | {"labels": 1} for c in changes], {"post_id": "p2"})[0]


def test_cap_draws_pairs_that_are_there_and_drops_unused_replies(tmp_path):
    frame = many(tmp_path)
    everything, _ = posts_of(frame)
    capped, other = posts_of(frame, max_pairs_per_post=3)
    assert (len(everything.pairs), len(capped.pairs), len(other.pairs)) == (28, 3, 1)
    texts = [{(p.replies[a], p.replies[b]) for a, b in p.pairs} for p in (capped, everything)]
    assert texts[0] < texts[1]
    assert {i for pair in capped.pairs for i in pair} == set(range(len(capped.replies)))


def test_draw_depends_on_the_seed_and_on_nothing_else(tmp_path):
    frame = many(tmp_path)
    drawn = posts_of(frame, max_pairs_per_post=3, seed=1)
    assert drawn == posts_of(frame, max_pairs_per_post=3, seed=1)
    assert drawn != posts_of(frame, max_pairs_per_post=3, seed=2)
    alone = posts_of(frame[frame["post_id"] == "p1"], max_pairs_per_post=3, seed=1)
    assert alone == drawn[:1]


def test_score_ratio_filter_keeps_the_clear_pairs(tmp_path):
    frame, _ = pairs_from(tmp_path, {}, {"post_id": "p2", "score_B": 5})
    assert [post.post_id for post in posts_of(frame, min_score_ratio=2.0)] == ["p1"]


def test_prompts_are_english_prompter_messages_that_are_there(tmp_path):
    prompts, origin = prompts_from(
        tmp_path,
        {},
        {"message_id": "m2", "role": "assistant", "text": "I am a model."},
        {"message_id": "m3", "lang": "es", "text": "Hola"},
        {"message_id": "m4", "deleted": True, "text": "gone"},
        {"message_id": "m5", "text": " \n"},
        {"message_id": "m6", "text": None},
        {"message_id": "m7", "text": " hello,  WHO are you?"},
        {"message_id": "m1", "text": "the same identifier again"},
        {"message_id": "m8", "parent_id": "m2", "text": "And why?\n"},
    )
    assert [prompt.text for prompt in prompts] == ["Hello, who are you?", "And why?"]
    assert [prompt.tree_id for prompt in prompts] == ["t1", "t1"]
    assert (origin.kind, origin.rows) == ("local", 2)


def test_messages_without_a_usable_prompt_are_an_error(tmp_path):
    with pytest.raises(UserError, match="oasst: no question is left .every English"):
        prompts_from(tmp_path, {"role": "assistant"})


def test_top_up_adds_questions_up_to_the_wish_and_says_so(tmp_path):
    prompts, origin = prompts_from(tmp_path, {})
    histories = ["Hello, who are you?", "Why?", "How?", "When?"]
    rows = [{"post_id": str(i), "history": text} for i, text in enumerate(histories)]
    posts = posts_of(pairs_from(tmp_path, *rows)[0])
    enlarged, stated = top_up(prompts, origin, posts, wanted=3)
    assert [prompt.text for prompt in enlarged] == ["Hello, who are you?", "Why?", "How?"]
    assert [prompt.origin for prompt in enlarged] == ["messages", "preferences", "preferences"]
    assert stated.rows == 3 and "2 questions of the preference data added" in stated.note
    assert stated.fingerprint != origin.fingerprint
    assert top_up(prompts, origin, posts, wanted=0) == (prompts, origin)


@pytest.mark.skipif(not os.environ.get("RLHF_DATA_DIR"), reason="RLHF_DATA_DIR names no local copy")
def test_local_copy_of_real_data_is_read():
    frame, origin = preferences.load_preferences(Path(os.environ["RLHF_DATA_DIR"]))
    capped = posts_of(frame, max_pairs_per_post=10)
    assert max(len(post.pairs) for post in capped) == 10
    assert sum(len(post.pairs) for post in capped) > 5000
    assert isinstance(frame, pd.DataFrame) and origin.rows == len(frame)
    prompts, _ = load_prompts(Path(os.environ["RLHF_DATA_DIR"]))
    assert len(prompts) > 1000
