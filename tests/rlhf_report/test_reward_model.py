"""What the report says of a reward model whose texts are there, hostile, or not kept."""

import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiment_runs.files import write_text
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_report import data, reward_model, tables

RECORD = {"stage": "stage", "identity": "0", "config": {}, "inputs": {}, "about": {}}

HOSTILE = "<script>x</script> {{< include a >}}\n\n# **b** `c`\x07"


@pytest.fixture
def make_run(tmp_path):
    """A function that makes a run with one mistake and these samples."""

    def make(*samples):
        path = tmp_path / "reward-1"
        path.mkdir()
        write_text(path / "config.json", json.dumps(RECORD))
        run = Run(path)
        for sample in samples:
            run.sample(**sample)
        mistake = {
            "pair": 4, "post": "p<1>", "domain": "a_b", "confidence": 0.93, "chosen": -1.5,
            "rejected": 2.25, "chosen_tokens": 7, "rejected_tokens": 90,
        }  # fmt: skip
        run.finish(mistakes=[mistake])
        return run

    return make


INPUT = {"step": 0, "post": "p1", "input_chosen": HOSTILE, "input_rejected": "no"}
TEXTS = {"step": 9, "mistake": 4, "prompt": HOSTILE, "chosen": "short", "rejected": "x" * 5000}


def test_texts_are_shown_as_they_are_and_long_ones_cut(make_run):
    run = make_run(INPUT, TEXTS)
    assert list(data.inputs_table(run).columns) == ["input_chosen", "input_rejected"]
    assert len(data.inputs_table(run)) == 1 and "as they were written" in data.texts_reading(run)
    blocks = reward_model.surest_mistakes(run)
    assert tables.quote(HOSTILE) in blocks
    (short,) = [block for block in blocks if block.endswith(tables.quote("short"))]
    assert short.startswith("> *Preferred in the data* (score") and "\n>\n" not in short
    assert max(map(len, blocks)) < 500
    text = "\n".join(blocks)
    assert "<script>" not in text and "{{<" not in text and "p<1>" not in text


@pytest.mark.parametrize("samples", [(), ({"step": 0, "post": "p1"},)])
def test_a_run_without_texts_shows_numbers_and_says_why(make_run, samples):
    run = make_run(*samples)
    assert "without the texts" in data.texts_reading(run)
    numbers = np.arange(9)
    run.save_arrays(
        "test_pairs", post=numbers.astype(str), chosen_tokens=numbers, rejected_tokens=numbers * 2
    )
    rows = data.inputs_table(run).to_dict("records")
    assert len(rows) == 5 and [*rows[3].values()] == ["3", 3, 6]
    text = "\n".join(reward_model.surest_mistakes(run))
    assert "93%" in text and "-1.50, 7 tokens" in text and "2.25, 90 tokens" in text
    assert "\n>" not in text  # no quotation


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "better than"), (-0.2, -0.01, "worse than"), (-0.1, 0.1, "may explain")],
)
def test_a_gain_is_claimed_only_where_its_interval_excludes_zero(low, high, words):
    own = {"gain": {"value": (low + high) / 2, "low": low, "high": high}}
    assert words in reward_model.accuracy_gain_reading(own)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(0.553, 0.558, "worse"), (0.6, 0.55, "helps"), (0.5501, 0.5502, "changes nothing")],
)
def test_a_temperature_that_does_harm_is_said_to(tmp_path, before, after, words):
    losses = {"before": {"log_loss": before}, "after": {"log_loss": after}}
    run = finished(tmp_path, {}, calibration=losses)
    assert words in reward_model.temperature_reading(run)


def test_what_is_trained_is_every_weight_or_adapters_and_the_head():
    summary = {"parameters": {"trunk": 1000, "head": 9}}
    told = [
        reward_model.trained_weights_reading(
            SimpleNamespace(summary=summary, config={"lora": lora})
        )
        for lora in (None, {"rank": 8, "targets": ["q_proj", "v_proj"]})
    ]
    assert told[0] == "Every weight is trained, 1,009 numbers."
    assert told[1].startswith("Low-rank adapters of rank 8 on q_proj, v_proj and the head")


def test_the_calibration_stands_beside_what_chance_alone_would_show(tmp_path):
    after = {"error": 0.0521, "error_by_chance": 0.0487}
    run = finished(tmp_path, {}, calibration={"after": after})
    told = reward_model.calibration_reading(run)
    assert told.startswith("0.052,") and "would show 0.049 on average" in told


def test_groups_are_explained_where_grades_were_planted(tmp_path):
    assert "domains" in reward_model.groups_reading(finished(tmp_path / "a", {}))
    run = finished(tmp_path / "b", {}, accuracy_by_grade={"easy": {}})
    for grade in ("easy", "hard", "medium", "partial"):
        assert f"{grade}," in reward_model.groups_reading(run)


@pytest.mark.parametrize("kind", ["hub", "local", "stand-in"])
def test_a_stand_in_is_told_from_what_data_label(tmp_path, kind):
    run = finished(tmp_path, {"preferences": {"kind": kind}})
    real = kind != "stand-in"
    assert ("label it" in data.preferred_reading(run)) == real


@pytest.mark.parametrize(
    ("kind", "note", "words"),
    [
        ("local", "", "nothing was lost."),
        ("local", "3 replies left out", "3 replies left out."),
        ("stand-in", "numpy 2.1, jax 0.10", "nothing was lost."),
        ("stand-in", "numpy 2.1, jax 0.10; 3 replies left out", "3 replies left out."),
    ],
)
def test_what_preferences_lost_is_told_of_a_stand_in_too(tmp_path, kind, note, words):
    run = finished(tmp_path, {"preferences": {"kind": kind, "note": note}})
    assert data.losses_reading(run) == words


@pytest.mark.parametrize(("kind", "words"), [("stand-in", "The prompts are a"), ("hub", "named")])
def test_the_first_page_says_what_stands_in(tmp_path, kind, words):
    about = {"preferences": {"kind": "hub"}, "prompts": {"kind": kind}}
    assert words in data.stand_in_reading(finished(tmp_path, about))


@pytest.mark.parametrize(
    ("kind", "name", "cited"),
    [("hub", "OpenAssistant/oasst1", True), ("local", "oasst2 messages", True),
     ("hub", "alpaca", False), ("stand-in", "documentation", False)],
)  # fmt: skip
def test_openassistant_is_named_only_where_the_prompts_are_its(tmp_path, kind, name, cited):
    text = data.prompts_reading(finished(tmp_path, {"prompts": {"kind": kind, "name": name}})).data
    assert ("@kopf2023openassistant" in text) == cited
    assert (tables.escape(name) in text) == (kind != "stand-in")


def finished(path, about, **summary):
    path.mkdir(exist_ok=True)
    record = {"stage": "reward", "identity": "r", "config": {}, "inputs": {}, "about": about}
    write_text(path / "config.json", json.dumps(record))
    run = Run(path)
    run.finish(**summary)
    return run


@pytest.mark.parametrize("chosen, rejected", [(0.326, 0.181), (2.0, -1.0), (-0.004, 0.5)])
def test_the_loss_of_a_pair_is_worked_out_and_the_printed_sum_holds(chosen, rejected):
    pairs = {"chosen": np.array([chosen, 9.0]), "rejected": np.array([rejected, 9.0])}
    run = SimpleNamespace(config={"margin": 1.0}, arrays=lambda name: pairs)
    text = reward_model.loss_example(run)
    margin, better, worse, loss = map(
        float, re.findall(r"-?\d+\.?\d*", text.removeprefix("max(0, ").replace("- (", "("))
    )
    assert abs(max(0.0, margin - (better - worse)) - loss) < 1e-9
    exact = objectives.margin_ranking_loss(
        jnp.array([chosen]), jnp.array([rejected]), margin=run.config["margin"]
    )
    assert abs(loss - float(exact[0])) <= 0.011


def test_the_same_recipe_twice_is_shown_with_what_each_training_reached():
    runs = reward_model.repeats()
    assert len(runs) == 2
    assert runs[0].config == runs[1].config
    assert runs[0].record["inputs"] == runs[1].record["inputs"]
    table = reward_model.repeats_table(runs)
    for shown, run in zip(table["accuracy"], runs, strict=True):
        assert shown.startswith(f"{run.summary['accuracy']['value']:.1%}")
    assert len(set(table["accuracy"])) == len(set(table["machine"])) == 2
