"""What the chapter on ratings shows of a run, and of the committed one beside it."""

import json

import pandas as pd
import pytest

from experiment_runs import settings
from experiment_runs.files import write_text
from experiment_runs.run import Run
from experiment_runs.settings import PROJECT
from rlhf_jax.ratings.store import CRITERIA, RATINGS, load_ratings, response_hash, save_rating
from rlhf_report import ratings, tables
from rlhf_report.quarto import notebook

HOSTILE = "{{< include x >}} <script>alert(1)</script> **bold** | a | b |"
MODELS = {"pretrained": 0.0, "ppo-full": 0.5, "ppo-lora": -0.5}


def evaluated(folder, name="evaluate", text="an answer", rated=2):
    """A finished evaluation of one prompt more than are there to be rated."""
    path = folder / name
    path.mkdir(parents=True)
    record = {
        "stage": "evaluate", "identity": name, "started": "2026-01-02", "config": {},
        "inputs": {},
        "about": {"profile": {"name": "tiny"}},
    }  # fmt: skip
    write_text(path / "config.json", json.dumps(record))
    run = Run(path)
    for i in range(rated + 1):
        for model, reward in MODELS.items():
            run.sample(
                step=0, prompt_id=i, model=model, prompt=f"question {i}", reward=reward,
                response=f"{model}: {text}", rated=i < rated,
            )  # fmt: skip
    run.finish(prompts=rated + 1)
    return run


def rate(run, rater, kind, score=3):
    for row in run.samples():
        if row["rated"]:
            key = response_hash(row["prompt"], row["response"])
            save_rating(run.path / RATINGS, key, rater, kind, dict.fromkeys(CRITERIA, score))


def test_the_committed_run_stands_beside_another_one_only(tmp_path):
    own = evaluated(tmp_path, "own")
    committed = tmp_path / "reference"
    assert ratings.reference_evaluation(own, committed) is None
    assert ratings.reference_section(None) == []
    reference = evaluated(committed)
    assert ratings.reference_evaluation(own, committed).path == reference.path
    assert ratings.reference_evaluation(reference, committed) is None


def test_committed_runs_without_an_evaluation_leave_the_section_out(tmp_path):
    own = evaluated(tmp_path, "own")
    (tmp_path / "reference").mkdir()
    assert ratings.reference_evaluation(own, tmp_path / "reference") is None


def test_the_section_is_labelled_and_shows_every_response_with_its_ratings(tmp_path):
    run = evaluated(tmp_path, text=HOSTILE)
    rate(run, "model X", "ai", score=4)
    first, *blocks = ratings.reference_section(run)
    assert "committed reference run" in first and "2026" in first
    assert "an AI system" in first and "not a person" in first
    text = "\n".join(blocks)
    assert "<script>" not in text and "{{<" not in text
    assert text.count("alert") == 6  # two prompts, three models; the third prompt is not rated
    assert text.count("4.0 |") >= 3 * 2 * len(CRITERIA)  # every response has its ratings
    assert "question 2" not in text
    assert "PPO, full" in text and "ppo-full" not in text.replace("ppo\\-full\\:", "")
    assert "fewer than two raters" in blocks[-1]


def test_two_raters_agree_as_far_as_kappa_says(tmp_path):
    run = evaluated(tmp_path)
    for rater in ("Anna", "Ben"):
        rate(run, rater, "person")
    given = load_ratings(run.path / RATINGS, ratings.rated_responses(run))
    rows = ratings.agreement_table(given).data.split("\n")
    assert len(rows) == 3 and "Anna, Ben" in rows[2].replace("\\", "")


def test_responses_have_about_as_much_room_as_their_five_ratings():
    heads = [[ratings.head(c), "2.0"] for c in CRITERIA]
    columns = [["prompt", "1"], ["generated response", "word " * 100], *heads]
    widths = tables.column_widths(columns)
    assert sum(widths) <= tables.LINE and widths[1] > 0.8 * sum(widths[2:])
    whole = [["prompt", "1"], columns[1], *([c, "2.0"] for c in CRITERIA)]
    assert tables.column_widths(whole)[1] < 0.6 * widths[1]


def test_a_table_of_one_model_has_a_prompt_a_row_and_the_five_ratings(tmp_path):
    run = evaluated(tmp_path)
    rate(run, "Anna", "person", score=2)
    rate(run, "Ben", "person", score=5)
    rated = ratings.rated_responses(run)
    given = load_ratings(run.path / RATINGS, rated)
    for name, model in (("ppo-full", "PPO, full"), ("pretrained", "pretrained")):
        rows = ratings.model_table(rated, given, model)
        assert list(rows["generated response"]) == [f"{name}: an answer"] * 2
        names = [name.replace(ratings.SOFT_HYPHEN, "") for name in rows.columns[2:]]
        assert names == [c.replace("_", " / ") for c in CRITERIA]
        assert (rows.iloc[:, 2:] == 3.5).all(axis=None)
    assert ratings.model_table(rated, [], "pretrained").iloc[:, 2:].isna().all(axis=None)


def scored(run, **scores):
    """The responses of a run, and one person's ratings: a score for each model."""
    rated = ratings.rated_responses(run)
    for row in run.samples():
        if row["rated"] and row["model"].replace("-", "_") in scores:
            key = response_hash(row["prompt"], row["response"])
            score = scores[row["model"].replace("-", "_")]
            save_rating(run.path / RATINGS, key, "A", "person", dict.fromkeys(CRITERIA, score))
    return rated, load_ratings(run.path / RATINGS, rated)


@pytest.mark.parametrize(
    ("full", "lora", "words"),
    [
        (2, 3, ("as in over-optimisation", "shows in no rating")),
        (4, 2, ("Both rose", "Both fell")),
        (3, 4, ("shows in no rating", "Rating up without reward")),
    ],
)
def test_reward_and_rating_are_read_together_whichever_way_they_moved(tmp_path, full, lora, words):
    """The reward of full PPO is above the pretrained policy's, that of LoRA below."""
    own = scored(evaluated(tmp_path, rated=6), pretrained=3, ppo_full=full, ppo_lora=lora)
    for line, word in zip(ratings.over_optimisation_reading(*own).split("\n"), words, strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("prompts", "words"), [(1, "1 prompt ranks no model"), (5, "5 prompts rank no model")]
)
def test_so_few_prompts_that_chance_would_do_rank_no_model(tmp_path, prompts, words):
    own = scored(evaluated(tmp_path, rated=prompts), pretrained=3, ppo_full=4, ppo_lora=2)
    told = ratings.over_optimisation_reading(*own)
    assert told.count(words) == 2 and "(+1.00)" in told and "(-1.00)" in told
    assert not any(verdict in told for verdict in ratings.MOVED.values())


@pytest.mark.parametrize(("above", "words"), [(6, "shows in no rating"), (1, "over-optimisation")])
def test_with_many_prompts_a_rating_moved_only_beyond_its_interval(tmp_path, above, words):
    """Of 12 responses of full PPO so many are rated a point above the pretrained one's."""
    run = evaluated(tmp_path, rated=12)
    for row in run.samples():
        if row["rated"] and row["model"] != "ppo-lora":
            tuned = 4 if row["prompt_id"] < above else 2
            score = tuned if row["model"] == "ppo-full" else 3
            key = response_hash(row["prompt"], row["response"])
            save_rating(run.path / RATINGS, key, "A", "person", dict.fromkeys(CRITERIA, score))
    rated = ratings.rated_responses(run)
    given = load_ratings(run.path / RATINGS, rated)
    (line,) = ratings.over_optimisation_reading(rated, given).split("\n")
    assert words in line and line.count("[") == 2


def test_of_many_rated_prompts_the_tables_show_as_many_as_the_assignment_asks_for(tmp_path):
    rated = ratings.rated_responses(evaluated(tmp_path, rated=5))
    shown = ratings.in_tables(rated)
    assert {row["prompt_id"] for row in shown} == {0, 1, 2} and len(shown) == 9
    assert "the first 3; every mean and comparison counts all 5" in ratings.scope_reading(rated)
    few = ratings.rated_responses(evaluated(tmp_path / "few"))
    assert ratings.in_tables(few) == few and ratings.scope_reading(few).endswith("all of them.")


def test_unrated_responses_are_compared_with_nothing(tmp_path):
    own = scored(evaluated(tmp_path), ppo_full=2)
    assert "nothing can be said" in ratings.over_optimisation_reading(*own)
    assert "there is no example" in ratings.telling_example(*own)
    assert set(ratings.criteria_table(*own)["highest"]) == {"–"}


def test_the_example_is_one_on_which_reward_model_and_raters_disagree(tmp_path):
    own = scored(evaluated(tmp_path), pretrained=4, ppo_full=2, ppo_lora=1)
    head = ratings.telling_example(*own).split("\n")[0]
    assert "prefers the response of PPO, full, at 0.50 to 0.00" in head
    assert "the raters prefer that of pretrained, at 4.0 to 2.0" in head
    assert head.startswith("The example that shows it best: ")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, "None until"),
        ({"ppo_full": 2}, "2 of 6 responses below have"),
        ({"pretrained": 1, "ppo_full": 2, "ppo_lora": 3}, "Every response below has"),
    ],
)
def test_what_is_claimed_of_ratings_follows_from_how_many_there_are(tmp_path, scores, words):
    assert ratings.claim_reading(*scored(evaluated(tmp_path), **scores)).startswith(words)


def test_a_submission_has_no_manual_of_how_to_rate(monkeypatch):
    def chapter():
        lines = notebook.read(PROJECT / "chapters" / "05-human-ratings.qmd").lines
        return "\n".join(line.text for line in lines)

    own = chapter()
    monkeypatch.setattr(settings, "submission", lambda: True)
    handed_in = chapter()
    for text in ("rlhf_jax rate", "make report", "ratings.jsonl", "committed"):
        assert text in own and text not in handed_in
    assert "{#sec-ratings-responses}" in handed_in and "until somebody rates them" in handed_in


def test_the_comparison_names_the_best_and_the_worst_of_each_criterion(tmp_path):
    rows = ratings.criteria_table(
        *scored(evaluated(tmp_path), pretrained=4, ppo_full=4, ppo_lora=1)
    )
    assert set(rows["highest"]) == {"pretrained and PPO, full"}
    assert set(rows["lowest"]) == {"PPO, LoRA"}


def test_equal_means_are_equal_whatever_the_order_of_their_sums():
    means = pd.Series({"a": 0.1 + 0.2, "b": 0.3, "c": 0.3})
    assert ratings.best(means) == "–"
    assert ratings.best(means - pd.Series({"a": 0.0, "b": 0.1, "c": 0.0})) == "a and c"
