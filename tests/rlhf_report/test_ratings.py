"""What the chapter on ratings shows of a run, and of the committed one beside it."""

import json

from experiment_runs.files import write_text
from experiment_runs.run import Run
from rlhf_jax.ratings.store import CRITERIA, RATINGS, load_ratings, response_hash, save_rating
from rlhf_report import ratings

HOSTILE = "{{< include x >}} <script>alert(1)</script> **bold** | a | b |"
MODELS = {"pretrained": 0.0, "ppo-full": 0.5, "ppo-lora": -0.5}


def evaluated(folder, name="evaluate", text="an answer"):
    """A finished evaluation whose first two prompts are there to be rated."""
    path = folder / name
    path.mkdir(parents=True)
    record = {
        "stage": "evaluate", "identity": name, "started": "2026-01-02",
        "about": {"profile": {"name": "tiny"}},
    }  # fmt: skip
    write_text(path / "config.json", json.dumps(record))
    run = Run(path)
    for i in range(3):
        for model, reward in MODELS.items():
            run.sample(
                step=0, prompt_id=i, model=model, prompt=f"question {i}", reward=reward,
                response=f"{model}: {text}", rated=i < 2,
            )  # fmt: skip
    run.finish(prompts=3)
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
    assert text.count("by 1 AI system") == 3 * 3  # each prompt, and both together
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
