import collections
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.data import documentation, preferences, splits, tables

SHP_COLUMNS = {
    "post_id", "domain", "history", "c_root_id_A", "c_root_id_B", "score_A", "score_B",
    "human_ref_A", "human_ref_B", "labels", "score_ratio",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    """The comparisons with the texts of both sides by name."""
    frame = documentation.preferences()
    a_first = frame["labels"] == 1
    frame["chosen"] = frame["human_ref_A"].where(a_first, frame["human_ref_B"])
    frame["rejected"] = frame["human_ref_B"].where(a_first, frame["human_ref_A"])
    return frame


@pytest.fixture(scope="module")
def posts(pairs):
    return preferences.posts(pairs, max_pairs_per_post=None, seed=0)


def test_columns_are_those_of_shp_and_the_grade():
    assert set(documentation.preferences().columns) == SHP_COLUMNS | {"grade"}


def test_there_are_enough_pairs_and_prompts_for_the_protocol(pairs, posts):
    assert len(pairs) >= 7_500  # 5,000 to train on after the split
    assert len(documentation.questions()) >= 2_200
    assert len(posts) == pairs["post_id"].nunique()


def test_every_question_has_each_grade_and_each_package_its_questions(pairs):
    grades = pairs.groupby("post_id")["grade"].agg(list)
    assert {tuple(sorted(names)) for names in grades} == {
        ("easy", "hard", "medium"),
        ("easy", "hard", "medium", "partial"),
    }
    assert set(pairs["domain"]) == set(documentation.OWNERS) == set(documentation.versions())


def test_right_answer_is_the_documentation_and_the_wrong_ones_are_what_their_grade_says(pairs):
    by_name = {entry.name: entry for entry in documentation.entries()}
    by_text = {entry.text: entry for entry in documentation.entries()}
    for row in pairs.itertuples():
        entry = by_name[row.post_id]
        if row.grade != "partial":
            assert row.chosen == entry.text
        if row.grade == "medium":
            words, right = row.rejected.split(), entry.text.split()
            cut = entry.text.startswith(row.rejected) and len(words) < len(right)
            assert cut or (words != right and sorted(words) == sorted(right))
        elif row.grade == "hard":
            assert by_text[row.rejected].owner == entry.owner
            assert row.rejected != entry.text
        else:
            assert by_text[row.rejected].package != entry.package


def test_scores_agree_with_the_labels_and_reach_the_usual_ratio(pairs):
    assert ((pairs["score_A"] > pairs["score_B"]) == (pairs["labels"] == 1)).all()
    assert pairs["score_ratio"].min() >= 2
    assert 0.45 < pairs["labels"].mean() < 0.55


def test_longer_answer_wins_no_more_often_than_in_real_data(pairs):
    longer = np.sign(pairs["chosen"].str.len() - pairs["rejected"].str.len())
    assert 0.5 <= (longer.mean() + 1) / 2 <= 0.65


def test_easy_and_hard_answers_are_each_right_somewhere_and_wrong_as_often(pairs):
    for grade in ("easy", "hard"):
        rows = pairs[pairs["grade"] == grade]
        assert collections.Counter(rows["chosen"]) == collections.Counter(rows["rejected"])


def test_no_text_is_on_two_sides_of_a_split(posts):
    parts = splits.split_posts(posts, fractions={"train": 0.7, "test": 0.3}, seed=0)
    assert splits.overlap(parts) == 0
    assert abs(len(parts["test"]) / len(posts) - 0.3) < 0.02


def test_paragraphs_are_clean_and_distinct():
    entries = documentation.entries()
    assert len({entry.text.casefold() for entry in entries}) == len(entries)
    assert len({entry.name.casefold() for entry in entries}) == len(entries)
    noise = re.compile(r"``|:\w+:`|>>>|\.\. |\s\s|\n|={2}|-{3}|:$|^[a-z]")
    for entry in entries:
        assert documentation.LEAST_WORDS <= len(entry.text.split()) <= documentation.MOST_WORDS
        assert not noise.search(entry.text), entry


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "cumsum(a, axis=None)\n\nReturn the cumulative sum of the elements along a given axis.",
            "Return the cumulative sum of the elements along a given axis.",
        ),
        (
            "Wrap :func:`~jax.numpy.sum` and :class:`Sum <jax.Sum>` for\n  ``x`` in `this` [1]_",
            "Wrap jax.numpy.sum and Sum for x in this.",
        ),
        (
            "A short one.\n\nThe next one completes it to enough words.\n\nParameters\n-----",
            "A short one. The next one completes it to enough words.",
        ),
        ("Too short.\n\nParameters\n----------\nx : array", ""),
        ("Computes the value of :math:`\\pi x^2` for all of the inputs here.", ""),
        ("Long " * 61, ""),
        ("", ""),
    ],
)
def test_first_paragraph_is_plain_text(text, expected):
    assert documentation.first_paragraph(text) == expected


def test_cut_answer_never_ends_with_its_sentence():
    for seed in range(50):
        text = "One two three four. Five six seven eight nine ten."
        assert not documentation.truncated(text, np.random.default_rng(seed)).endswith(
            (".", "four")
        )


def test_texts_are_the_same_in_another_process_without_a_network(pairs):
    code = (
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event.startswith('socket.'): raise RuntimeError(event)\n"
        "sys.addaudithook(refuse)\n"
        "from rlhf_jax.data import documentation, tables\n"
        "print(tables.content_fingerprint(documentation.preferences()))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    ours = tables.content_fingerprint(pairs.drop(columns=["chosen", "rejected"]))
    assert result.stdout.split() == [ours]
