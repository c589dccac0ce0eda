"""What the GAN's chapter says follows from the table of its detectors, whatever stands there."""

import json
import pathlib
import types

import pytest

from experiment_runs.run import Run
from gan_jax import calibration
from rlhf_report import long_trainings, mode_collapse

CONFIG = {"evidence": {"draws": 10}}
RECORD = {"stage": "stage", "identity": "0", "config": CONFIG, "inputs": {}, "about": {}}

SCENARIOS = (
    "real", "real + noise", "real, blurred", "copies of training images", "10 real images repeated",
    "generator collapsed to 10 latents", "generated",
)  # fmt: skip
OLD = tuple(name for name in SCENARIOS if "blurred" not in name)
# one row a detector, one value a scenario; 0 is real, and beyond -1 and 1 it is caught
MOVED = {
    "twins": (0, 0, 0, 0, 9, 9, 2),
    "birthday": (0, 5, 0, 0, -9, -9, 0),
    "fid": (0, 7, 0, 0, 9, 9, 7),
    "train_nearest": (0, 0, 0, 3, 0, 0, 0),
}


@pytest.fixture
def told(tmp_path):
    """A run with these means of the detectors, and other results."""

    def write(moved, places=SCENARIOS, **summary):
        rows = [
            ({} if places == OLD else {"p": 0.001 if abs(value) > 1 else 1.0}) | {
                "scenario": scenario, "detector": detector, "mean": value, "low": value - 0.1,
                "high": value + 0.1, "real_low": -1, "real_high": 1, "caught": abs(value) > 1,
            }
            for place, scenario in enumerate(places)
            for detector, value in ((name, values[place]) for name, values in moved.items())
        ]  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(RECORD))
        (tmp_path / "summary.json").write_text(
            json.dumps({"identity": "0", "detectors": rows} | summary)
        )
        return Run(tmp_path)

    return write


def test_detectors_of_collapse_move_with_both_collapses_and_so_with_nothing_else(told):
    """FID moves with noise too; the birthday size does, but the other way."""
    run = told(MOVED)
    assert mode_collapse.collapse_detectors(run) == ["birthday size", "twins"]
    assert "birthday size and twins" in mode_collapse.planted_defects_reading(run)
    assert "Of 4 planted defects 4 are caught." in mode_collapse.planted_defects_reading(run)
    table = mode_collapse.collapse_table(run)
    assert list(table["moves alike"]) == ["no", "yes"]


def test_what_blur_alone_moves_as_far_says_nothing_of_collapse(told):
    as_far = told(MOVED | {"twins": (0, 0, 9, 0, 9, 9, 9)})
    assert mode_collapse.collapse_detectors(as_far) == ["birthday size"]
    assert "move twins: what these say" in mode_collapse.planted_defects_reading(as_far)
    nearer = told(MOVED | {"twins": (0, 0, 4, 0, 9, 9, 9)})
    assert mode_collapse.collapse_detectors(nearer) == ["birthday size", "twins"]
    assert (
        "twins moves as in a planted collapse, further than with blur"
        in mode_collapse.collapse_reading(nearer)
    )


def test_a_generator_that_moves_no_further_than_blur_has_not_collapsed(told):
    """Its twins are more than those of real images: as many as blur makes."""
    run = told({"twins": (0, 0, 4, 0, 9, 9, 4), "birthday": (0, 0, -4, 0, -9, -9, -3)})
    assert mode_collapse.collapse_detectors(run) == ["birthday size", "twins"]
    assert "no mode collapse of this kind is seen" in mode_collapse.collapse_reading(run)
    table = mode_collapse.collapse_table(run)
    assert list(table["moves alike"]) == ["no", "no"]
    assert list(table["real, blurred"]) == ["-4 [-4.1, -3.9]", "4 [3.9, 4.1]"]


def test_the_strength_of_noise_and_blur_is_said_where_it_was_matched(told):
    old = mode_collapse.noise_reading(told(MOVED))
    assert (
        old == "They move the FID from 0 to 7 (noise) and 0 (blurred); the trained generator has 7."
    )
    matched = told(MOVED, matched={"fid": 7.0, "noise": 0.2, "blur": 0.041})
    words = "10.0% of the pixels' range and 4.1% of the images' side"
    assert words in mode_collapse.noise_reading(matched)


def test_a_run_of_the_old_rule_says_so_and_concludes_nothing(told):
    run = told({name: (*values[:2], *values[3:]) for name, values in MOVED.items()}, places=OLD)
    assert "older than the rule of today" in mode_collapse.rule_reading(run)
    assert "nothing can be said of collapse" in mode_collapse.collapse_reading(run)
    assert "Holm's correction over all 24" in mode_collapse.rule_reading(told(MOVED))


def test_the_reading_names_who_reacts_to_the_trained_generator_and_who_does_not(told):
    text = mode_collapse.collapse_reading(told(MOVED))
    assert text.startswith(
        "On the trained generator twins moves as in a planted collapse, further than with blur, "
        "birthday size does not."
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"twins": (0, 0, 0, 0, 9, 9, 0)}, "Verdict: no mode collapse of this kind is seen."),
        ({"birthday": (0, 5, 0, 0, -9, -9, 5)}, "variety is lost in part"),
        (
            {"birthday": (0, 5, 0, 0, -9, -9, -5)},
            "and twins move as in a planted collapse, further than with blur. Verdict: every",
        ),
        (
            {"twins": (0, 9, 0, 0, 9, 9, 9), "birthday": (0, 0, 0, 0, 0, 9, 9)},
            "there is no verdict",
        ),
    ],
)
def test_the_reading_of_collapse_follows_the_table(told, change, words):
    assert words in mode_collapse.collapse_reading(told(MOVED | change))


def test_a_defect_that_nothing_catches_is_said_to_go_unnoticed(told):
    run = told(MOVED | {"train_nearest": (0, 0, 0, 0, 0, 0, 0)})
    text = mode_collapse.planted_defects_reading(run)
    assert "3 are caught" in text and '"copies of training images": such a defect' in text
    assert "would go unseen" in mode_collapse.copying_reading(run)


@pytest.mark.parametrize(
    "value, words",
    [
        (0, "no recitation"),
        (4, "training share moves the same way. Verdict: every sign of recitation"),
        (-4, "no recitation"),
    ],
)
def test_recitation_is_read_from_what_catches_copies(told, value, words):
    text = mode_collapse.copying_reading(told(MOVED | {"train_nearest": (0, 0, 0, 3, 0, 0, value)}))
    assert "training share" in text and words in text


@pytest.mark.parametrize(
    "value, words",
    [(0, "some signs of recitation are there and others not"), (4, "every sign of recitation")],
)
def test_recitation_is_graded_by_how_many_of_its_detectors_move(told, value, words):
    copying = {"train_nearest": (0, 0, 0, 3, 0, 0, 4), "other": (0, 0, 0, 3, 0, 0, value)}
    assert words in mode_collapse.copying_reading(told(copying))


def test_a_support_without_twins_is_a_bound(told):
    numbers = {"mean": 250.0, "low": 200.0, "high": 300.0}
    rows = [
        {"scenario": name, "size": numbers, "support": numbers, "bounded": bounded}
        for name, bounded in (("a", True), ("b", False))
    ]
    bound, exact = mode_collapse.birthday_table(told(MOVED, birthday=rows))["support"]
    assert bound == "at least 250" and exact == "250 [200, 300]"


def test_only_intervals_that_lie_apart_are_read_as_a_difference(told):
    def row(name, held_out, generated):
        kinds = {"held_out": held_out, "generated": generated}
        own = {k: v and {"mean": v, "low": v - 0.1, "high": v + 0.1} for k, v in kinds.items()}
        return {"class": name, "labels": None, **own}

    rows = [row("one", 0.2, 0.35), row("two", 0.2, None), row("three", 0.2, 0.6)]
    run = told(MOVED, class_similarity=rows)
    text = mode_collapse.similarity_reading(run)
    assert text == "Beyond both intervals, generated images are more alike than real ones in three."
    assert list(mode_collapse.class_table(run, "class_similarity").iloc[1])[1:] == [
        "–", "0.2 [0.1, 0.3]", "–",
    ]  # fmt: skip
    assert mode_collapse.class_table(told(MOVED, x=[]), "x").empty


def test_the_classifier_is_told_beside_naming_the_largest_class(told):
    own = {"mean": 0.7, "low": 0.65, "high": 0.75, "majority": 0.669}
    text = mode_collapse.classifier_reading(told(MOVED, classifier=own))
    assert "right on 70.0% [65.0%, 75.0%]" in text and "would be on 66.9%" in text
    assert "no classifier" in mode_collapse.classifier_reading(told(MOVED, classifier=None))


def with_twins(name, share, scenario=mode_collapse.GENERATED):
    """What is known of a training, or of blurred images, of which this share has a twin."""
    row = {"scenario": scenario, "detector": "twins", "mean": share}
    rows = [row | {"low": share - 0.01, "high": share + 0.01}]
    path = pathlib.Path(name)
    return types.SimpleNamespace(summary={"detectors": rows}, path=path)


def test_a_long_training_has_collapsed_where_most_of_its_images_have_a_twin_beyond_blur():
    shares = {"plain": (0.69, 0.22), "augmentation": (0.21, 0.12), "spectral norm": (0.09, 0.85)}
    runs = {name: with_twins(name, own) for name, (own, _) in shares.items()}
    blurred = {
        name: with_twins(name, blur, calibration.BLURRED).summary
        for name, (_, blur) in shares.items()
    }
    assert long_trainings.reading(runs, blurred) == (
        "The share of images that have a twin, in brackets that of real images blurred to the same "
        "FID: of “plain” 69% (22%), the training has collapsed; of “augmentation” 21% (12%), "
        "variety is lost; of “spectral norm” 9% (85%), no more than blur makes."
    )


def test_the_committed_long_trainings_stand_beside_real_images_of_the_same_fid():
    runs, blurred = long_trainings.committed(), long_trainings.matched_blur()
    table = long_trainings.table(runs)
    assert next(iter(runs)) == "plain, 1,000 epochs" and len(table) == 1 + 2 * len(runs)
    for name, run in runs.items():
        own, blur = (
            long_trainings.by_detector(found, scenario)["fid"]["mean"]
            for found, scenario in (
                (run.summary, long_trainings.GENERATED),
                (blurred[run.path.name], calibration.BLURRED),
            )
        )
        assert blur == pytest.approx(own, rel=0.1), name
