"""Data as their owners publish them: other columns, other files, whole repositories."""

import json

import datasets
import pandas as pd
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import dialogues, locations, preferences
from rlhf_jax.data.prompts import load_prompts

USER = {"role": "user", "content": "Why does bread rise?"}
GOOD = {"role": "assistant", "content": "Yeast makes gas."}
BAD = {"role": "assistant", "content": "Magic."}
SHAREGPT = [{"from": "human", "value": "Why does bread rise?"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Why does bread rise?"}]}]
HH = "\n\nHuman: Why does bread rise?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": "Yeast makes gas.", "rejected": "Magic."},
        {"question": USER["content"], "chosen": "Yeast makes gas.", "rejected": "Magic."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": HH + "Yeast makes gas.", "rejected": HH + "Magic."},
        {"prompt": HH, "chosen": " Yeast makes gas.", "rejected": " Magic."},
        {"prompt": SHAREGPT, "chosen": "Yeast makes gas.", "rejected": "Magic."},
        {"prompt": PARTS, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": HH, "chosen": HH + "Yeast makes gas.", "rejected": HH + "Magic."},
        {"prompt": f"prompter: {USER['content']}", "chosen": GOOD["content"], "rejected": "Magic."},
        {"trajectory": SHAREGPT, "chosen": "Yeast makes gas.", "rejected": "Magic."},
        {
            "chosen": [{"input": USER["content"], "output": GOOD["content"]}],
            "rejected": [{"input": USER["content"], "output": "Magic."}],
        },
        {"input": USER["content"], "chosen": "Yeast makes gas.", "rejected": "Magic."},
        {
            "chosen": (HH + "Yeast makes gas.").replace("\n", "\r\n"),
            "rejected": (HH + "Magic.").replace("\n", "\r\n"),
        },
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "Yeast makes gas."},
            "rejected": {"from": "gpt", "value": "Magic."},
        },
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_way_to_write_a_comparison_gives_the_same_post(tmp_path, row, suffix):
    (tmp_path / "preferences").mkdir()
    path = tmp_path / "preferences" / f"pairs.{suffix}"
    frame = pd.DataFrame([row])
    frame.to_parquet(path) if suffix == "parquet" else path.write_text(json.dumps(row))
    loaded, source = preferences.load_preferences(tmp_path)
    for found in (
        preferences.posts(loaded, max_pairs_per_post=None, seed=0),
        preferences.preference_posts(frame),
        preferences.preference_posts(row for _ in range(2)),
    ):
        [post] = found
        assert (post.prompt, post.replies) == (USER["content"], ("Yeast makes gas.", "Magic."))
        assert post.pairs == ((0, 1),)
    assert (source.kind, source.note) == ("local", "")


def test_pairs_of_one_question_are_one_post():
    rows = [{"prompt": "Why?", "chosen": f"Answer {i}", "rejected": "None"} for i in range(3)]
    [post] = preferences.preference_posts([*rows, {**rows[0], "prompt": " why? "}][:3])
    assert len(post.replies) == 4 and len(post.pairs) == 3


def test_dialogues_of_several_turns_are_told_with_their_speakers():
    turns = [
        {"role": "system", "content": "Be brief."}, USER, GOOD,
        {"role": "user", "content": "And where does the yeast come from?"},
    ]  # fmt: skip
    row = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    [post] = preferences.preference_posts([row])
    assert post.prompt == (
        "Be brief.\n\nHuman: Why does bread rise?\n\nAssistant: Yeast makes gas.\n\n"
        "Human: And where does the yeast come from?"
    )
    _, notes = preferences.comparisons([("pairs", pd.DataFrame([row]).rename_axis("row"))])
    assert preferences.said(notes) == "1 questions are dialogues of several turns"


def test_dialogues_that_cannot_be_compared_are_left_out_and_counted(tmp_path):
    other = {"role": "user", "content": "Why does steel rust?"}
    rows = [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [other, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER]},
        {"chosen": [USER, GOOD], "rejected": None},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame, source = preferences.load_preferences(None, str(path))
    assert len(frame) == 1
    assert source.note == (
        "1 pairs of dialogues part before the last answer; "
        "3 rows without a question or an answer left out"
    )


def post_of(row):
    [post] = preferences.preference_posts([row])
    return post


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = {"chosen": "Yeast makes gas.", "rejected": "Magic."}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("row", [
    {"prompt": USER["content"], **ANSWERS}, {"prompt": USER["content"], **WHOLE}, WHOLE,
    {"prompt": [SYSTEM, USER], **ANSWERS},
    {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
])  # fmt: skip
def test_a_system_message_is_read_once_wherever_it_stands(tmp_path, name, row):
    post = post_of(row | {name: "Be brief."})
    assert post.turns == (("system", "Be brief."), ("user", USER["content"]))
    write_lines(tmp_path / "a.jsonl", [row | {name: "Be brief."}])
    [prompt], _ = load_prompts(None, str(tmp_path))
    assert (prompt.turns, prompt.text) == (post.turns, post.prompt)


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_system_message_of_a_dialogue_beside_the_prompt_belongs_to_it(tmp_path, name, suffix):
    row = {"prompt": USER["content"], "prompt_id": "1", name: [SYSTEM, USER, GOOD]}
    path = tmp_path / f"a.{suffix}"
    frame = pd.DataFrame([row])
    frame.to_parquet(path) if suffix == "parquet" else write_lines(path, [row])
    [prompt], _ = load_prompts(None, str(path))
    assert prompt.turns == (("system", "Be brief."), ("user", USER["content"]))
    assert post_of(row | ANSWERS).turns == prompt.turns


def test_a_system_message_that_the_prompt_repeats_or_that_is_empty_is_not_doubled(tmp_path):
    texts = ["Be brief.\n\nWhy?", "And why?"]
    dialogues = [[SYSTEM, USER, GOOD], [{"role": "system", "content": ""}, USER, GOOD]]
    rows = [
        {"prompt": text, "messages": whole} for text, whole in zip(texts, dialogues, strict=True)
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    found, _ = load_prompts(None, str(tmp_path))
    assert [(prompt.text, prompt.turns) for prompt in found] == [(text, ()) for text in texts]


@pytest.mark.parametrize("column", ["instruction", "question"])
@pytest.mark.parametrize("beside", ["input", "context"])
def test_what_a_question_is_about_belongs_to_it(tmp_path, column, beside):
    row = {column: "Who is it?", beside: "Bob came in.", **ANSWERS}
    write_lines(tmp_path / "a.jsonl", [row, row | {column: "And now?", beside: ""}])
    prompts, _ = load_prompts(None, str(tmp_path))
    assert [prompt.text for prompt in prompts] == ["Who is it?\n\nBob came in.", "And now?"]
    assert post_of(row).prompt == "Who is it?\n\nBob came in."


def test_a_column_tells_the_split_where_no_name_does(tmp_path):
    """HelpSteer2 and others keep their splits in one file."""
    rows = [{"prompt": f"Why {split}?", "split": split, **ANSWERS} for split in
            ("val", "train", "test_prefs", "other", None)]  # fmt: skip
    write_lines(tmp_path / "pairs.jsonl", rows)
    frame, _ = preferences.load_preferences(None, str(tmp_path))
    assert [*frame["split"]] == ["validation", "train", "test", "", ""]
    (tmp_path / "pairs.jsonl").rename(tmp_path / "test.jsonl")
    frame, _ = preferences.load_preferences(None, str(tmp_path))
    assert {*frame["split"]} == {"test"}


@pytest.mark.parametrize(
    "before", [[SYSTEM], [USER, GOOD], [{"role": "user", "content": " "}], [USER, GOOD, SYSTEM]]
)
def test_answers_to_nobody_are_left_out(before):
    rows = [{"chosen": [*before, GOOD], "rejected": [*before, BAD]}, WHOLE]
    frame, notes = preferences.comparisons([("pairs", pd.DataFrame(rows).rename_axis("row"))])
    assert [*frame["history"]] == [USER["content"]]
    assert preferences.said(notes) == "1 rows without a question or an answer left out"


def test_comparisons_of_a_reply_with_itself_are_counted_and_alone_refused():
    same = {"prompt": "Why?", "chosen": "So.", "rejected": " So."}
    frame = pd.DataFrame([same, {"prompt": "Why?", **ANSWERS}]).rename_axis("row")
    assert "1 comparisons of a reply with itself" in preferences.said(
        preferences.comparisons([("pairs", frame)])[1]
    )
    with pytest.raises(UserError, match="two answers .1 comparisons of a reply with itself"):
        preferences.preference_posts([same])


WRITTEN = [
    str([USER, GOOD]), json.dumps([USER, GOOD]), '["Why does bread rise?"]',
    "### Human: Why?### Assistant: So.", "<|im_start|>user\nWhy?<|im_end|>", "[INST] Why? [/INST]",
    "Below is a task.\n\n### Instruction:\nAdd.\n\n### Response:\n3",
    "<|start_header_id|>user<|end_header_id|>", "<start_of_turn>user\nWhy?", "<|user|>\nWhy?",
    "Human: Why?\nAssistant: So.", "User: Why?\n\nAssistant: So.", "\nHuman: a\nb\n Bot: So.",
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_dialogues_that_are_written_into_texts_in_another_way_are_refused(tmp_path, text):
    for column in ("prompt", "chosen"):
        with pytest.raises(UserError, match=f"pairs: .* in 1 of 1 texts of '{column}'.*lists of"):
            preferences.preference_posts([{"prompt": "Why?", **ANSWERS, column: text}])
    write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": text}, {"text": "Why?"}])
    with pytest.raises(UserError, match=r"a\.jsonl: .* in 2 of 3 texts of 'text'.*lists of"):
        load_prompts(None, str(tmp_path))
    write_lines(tmp_path / "a.jsonl", [{"text": text}, {"text": "How?"}, {"text": "Why?"}])
    assert len(load_prompts(None, str(tmp_path))[0]) == 3  # somebody asks about such a text


def test_an_answer_is_no_prompt(tmp_path):
    write_lines(tmp_path / "a.jsonl", [ANSWERS])
    with pytest.raises(UserError, match="no question is left .column 'chosen'"):
        load_prompts(None, str(tmp_path))


def test_columns_that_are_made_here_are_not_taken_from_the_data():
    row = shp_row("p", "askbaking", "train") | {"turns": "3", "grade": 5}
    assert (post_of(row).turns, post_of(row).grades) == ((), ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text_a": "x", "text_b": "y"}, "no preferences in its columns, text_a, text_b.*chosen"),
        ({"prompt": "x", "chosen": 3, "rejected": "y"}, "row 1: 'chosen' is 3; it must be a text"),
        ({"prompt": "x", "chosen": [{"text": "y"}], "rejected": "y"}, "row 1: 'chosen' holds the"),
        ({"chosen": "Yeast.", "rejected": "Magic."}, "no row has a question.*'Human:'"),
    ],
)
def test_what_is_no_comparison_is_told_with_what_would_be(row, message):
    with pytest.raises(UserError, match=message):
        preferences.preference_posts([row])


def test_a_filter_by_votes_needs_votes():
    rows = [{"prompt": "Why?", "chosen": "A", "rejected": "B"}]
    frame, _ = preferences.comparisons([("pairs", pd.DataFrame(rows).rename_axis("row"))])
    with pytest.raises(UserError, match="min_score_ratio=2.0: the replies have no votes"):
        preferences.posts(frame, max_pairs_per_post=None, min_score_ratio=2.0, seed=0)


def test_a_dialogue_gives_the_question_that_is_to_be_answered():
    asked, answered = ("user", "Why?"), ("assistant", "So.")
    assert dialogues.first_question([asked]) == [asked]
    assert dialogues.first_question([asked, answered]) == [asked]
    assert dialogues.first_question([asked, answered, asked, answered]) == [asked]
    assert dialogues.first_question([asked, answered, asked]) == [asked, answered, asked]
    assert dialogues.first_question([]) == []


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl.gz", "train"),
        ("data/train-00000-of-00001-42e8b.parquet", "train"),
        ("default/test/0000.parquet", "test"),
        ("askbaking/validation.json", "validation"),
        ("data/test_prefs-00000-of-00002.parquet", "test"),
        ("test-tasks/train.csv", "train"),
        ("dev.csv", "validation"),
        ("trainer_pairs.csv", ""),
        ("latest.jsonl", ""),
        ("eli5_pairs.jsonl.gz", ""),
    ],
)
def test_official_splits_are_told_by_the_names_of_files_and_folders(name, split):
    assert locations.official_split(name) == split


COLUMNS = ["post_id", "domain", "history", "human_ref_A", "human_ref_B", "labels"]


def shp_row(post, domain, split, **changes):
    texts = {
        "history": f"Question {post}?",
        "human_ref_A": f"{post} yes",
        "human_ref_B": f"{post} no",
    }
    votes = {"score_A": 3, "score_B": 12, "labels": 0, "score_ratio": 4.0, "upvote_ratio": 0.98}
    return {"post_id": post, "domain": f"{domain}_{split}", **texts, **votes, **changes}


def clone_of_shp(folder):
    """The folders and files of stanfordnlp/SHP as git brings them."""
    domains = ("askacademia", "askbaking", "legaladvice")
    for domain in domains:
        (folder / domain).mkdir(parents=True)
        for split in ("train", "test", "validation"):
            rows = [shp_row(f"{domain}-{split}-{i}", domain, split) for i in range(2)]
            rows.append(shp_row(f"{domain}-{split}-e", domain, split, human_ref_A=""))
            path = folder / domain / f"{split}.json"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("# SHP")
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}, indent=1))
    (folder / ".git").mkdir()
    (folder / ".git" / "shallow.json").write_text("{}")
    (folder / "askbaking" / "._train.json").write_bytes(b"\0\5\26\7")
    return domains


def test_a_clone_of_shp_gives_what_the_hub_gives(tmp_path, monkeypatch):
    domains = clone_of_shp(tmp_path / "shp")
    frame, source = preferences.load_preferences(tmp_path)
    assert {*frame["domain"]} == {*domains}
    assert source.note == "9 rows without a question or an answer left out"
    assert frame.groupby("split", sort=False).size().to_dict() == {
        "train": 6, "validation": 6, "test": 6,
    }  # fmt: skip
    hub = datasets.load_dataset("json", data_files={
        split: sorted(str(path) for path in (tmp_path / "shp").glob(f"*/{split}.json"))
        for split in ("train", "validation", "test")
    }, cache_dir=str(tmp_path / "cache"))  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    from_hub, hub_source = preferences.load_preferences(None, "stanfordnlp/SHP")
    assert hub_source.kind == "hub" and hub_source.note == source.note
    pd.testing.assert_frame_equal(from_hub, frame)
    assert hub_source.fingerprint == source.fingerprint


def test_a_hub_id_goes_before_the_folder_and_may_name_a_configuration(tmp_path, monkeypatch):
    clone_of_shp(tmp_path / "shp")
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.5}]
    parts = {
        "train_prefs": datasets.Dataset.from_list(rows),
        "test_prefs": datasets.Dataset.from_list(rows),
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or parts)
    frame, source = preferences.load_preferences(tmp_path, "owner/pairs:default")
    assert asked == [("owner/pairs", "default")]
    assert (source.kind, source.name, source.rows) == ("hub", "owner/pairs:default", 2)
    assert [*frame["split"]] == ["train", "test"] and {*frame["domain"]} == {"all"}


def test_what_is_neither_a_folder_nor_an_id_is_told():
    with pytest.raises(UserError, match="no/such/folder: no such folder or file, and no id"):
        preferences.load_preferences(None, "no/such/folder")


def message(number, **changes):
    return {
        "message_id": f"m{number}", "message_tree_id": "m1", "text": f"Question {number}?",
        "role": "prompter", "lang": "en", "deleted": False, "review_result": True, **changes,
    }  # fmt: skip


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_repository_of_oasst_is_read_as_it_is(tmp_path):
    answer = message(2, role="assistant", text="So.", replies=[message(3, replies=[])])
    tree = {
        "message_tree_id": "m1",
        "tree_state": "ready_for_export",
        "prompt": message(1, replies=[answer, message(4, replies=[], review_result=None)]),
    }
    del tree["prompt"]["deleted"], tree["prompt"]["review_result"]
    name = tmp_path / "oasst" / "2023-04-12_oasst"
    write_lines(name.with_name("2023-04-12_oasst_all.trees.jsonl"), [tree])
    spam = [
        message(5, review_result=False),
        message(6, deleted=True),
        message(4, review_result=False),
    ]
    write_lines(name.with_name("2023-04-12_oasst_spam.messages.jsonl"), spam)
    ready = [message(1), message(5), message(7, review_result=None), message(8, lang="de")]
    write_lines(name.with_name("2023-04-12_oasst_ready.messages.jsonl"), ready)
    prompts, source = load_prompts(tmp_path)
    assert [prompt.prompt_id for prompt in prompts] == ["m1", "m3", "m7"]
    assert (
        source.note
        == "every English message by a prompter; 3 deleted or rejected in review left out"
    )


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet", "a.jsonl"])
def test_no_text_or_identifier_is_taken_for_a_missing_value_or_a_number(tmp_path, name):
    rows = [
        {"post_id": "007", "history": "What did it print?", "human_ref_A": a, "human_ref_B": b,
         "labels": 1, "domain": "NA"}
        for a, b in (("None", "NA"), ("null", "nan"), ("42", "1e3"))
    ]  # fmt: skip
    rows.append(rows[0] | {"human_ref_B": ""})
    folder = tmp_path / "shp"
    folder.mkdir()
    frame = pd.DataFrame(rows)
    if ".csv" in name:
        frame.to_csv(folder / name, index=False)
    elif name == "a.parquet":
        frame.to_parquet(folder / name)
    else:
        write_lines(folder / name, rows)
    loaded, source = preferences.load_preferences(tmp_path)
    [post] = preferences.posts(loaded, max_pairs_per_post=None, seed=0)
    assert (post.post_id, post.domain) == ("007", "NA")
    assert {*post.replies} == {"None", "NA", "null", "nan", "42", "1e3"}
    assert source.note == "1 rows without a question or an answer left out"


@pytest.mark.parametrize("yes", [True, 1, 1.0, "true", "True", "1"])
def test_what_a_file_says_by_true_is_true(tmp_path, yes):
    rows = [message(1, deleted=yes), message(2, review_result=yes)]
    path = tmp_path / "a.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    for given in (path, tmp_path / "b.jsonl"):
        write_lines(tmp_path / "b.jsonl", rows)
        prompts, _ = load_prompts(None, str(given))
        assert [prompt.prompt_id for prompt in prompts] == ["m2"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "Why?", "text": "another"}, "Why?"),
        ({"prompt": [USER]}, USER["content"]),
        ({"messages": [USER, GOOD, USER, BAD]}, USER["content"]),
        ({"conversations": SHAREGPT}, USER["content"]),
        ({"instruction": "Translate.", "input": "Haus", "output": "house"}, "Translate.\n\nHaus"),
        ({"system": "Be brief.", "question": "Why?"}, "Be brief.\n\nWhy?"),
        ({"chosen": HH + "Yeast.", "rejected": HH + "Magic."}, USER["content"]),
        ({"text": "Why?"}, "Why?"),
        ({"turns": ["Why?", "And then?"], "category": "writing"}, "Why?"),
        ({"prompt": ["Why?", "And then?"]}, "Why?"),
        ({"turns": [{"content": "Why?"}]}, "Why?"),
        ({"data": ["Why?", "So.", "And then?", "So."]}, "Why?"),
        ({"conversations": ["Why?", "So."]}, "Why?"),
        ({"conversation": [{"input": "Why?", "output": "So."}]}, "Why?"),
        ({"conversation": [{"input": "Why?", "output": None}], "prompt": "Why?"}, "Why?"),
        ({"inputs": "Why?", "targets": "So."}, "Why?"),
        ({"conversations": [*SHAREGPT, {"from": "chatgpt", "value": "So."}]}, USER["content"]),
        ({"prompt": "prompter: A?\nassistant: B.\nprompter: C?\nD: prompter"},
         "Human: A?\n\nAssistant: B.\n\nHuman: C?\nD: prompter"),
        ({"prompt": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant:"},
         "Human: A?\n\nAssistant: B.\n\nHuman: C?"),
        ({"messages": [USER, GOOD, USER]}, (
            "Human: Why does bread rise?\n\nAssistant: Yeast makes gas.\n\n"
            "Human: Why does bread rise?"
        )),
    ],
)  # fmt: skip
def test_every_column_of_questions_gives_prompts(tmp_path, row, text):
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pd.DataFrame([row, row]).to_parquet(path)
    [prompt], source = load_prompts(None, str(tmp_path))
    assert prompt.text == text
    assert source.kind == "local" and source.note.startswith("column")


def test_columns_without_a_question_are_told_with_those_that_would_do(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"answer": "x", "score": 1}])
    with pytest.raises(
        UserError, match=r"a\.jsonl: no prompts in its columns, answer, score.*prompt"
    ):
        load_prompts(None, str(tmp_path))
    write_lines(tmp_path / "a.jsonl", [{"prompt": 7}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: 'prompt' is 7; it must be a text or a"):
        load_prompts(None, str(tmp_path))


def test_oasst_of_the_hub_is_read_by_its_messages(monkeypatch):
    parts = {name: datasets.Dataset.from_list([message(n)]) for n, name in enumerate("ab")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    prompts, source = load_prompts(None, "OpenAssistant/oasst1")
    assert [prompt.prompt_id for prompt in prompts] == ["m0", "m1"]
    assert (source.kind, source.licence) == ("hub", "Apache-2.0")
