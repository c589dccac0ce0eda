"""The appendix shows what is committed."""

import dataclasses
import json
import re
from types import SimpleNamespace

import bench
import pandas as pd
import pytest

from experiment_runs import assignment
from experiment_runs.files import encode
from experiment_runs.settings import PROJECT
from gan_jax.config import PROFILES
from rlhf_jax import profiles
from rlhf_jax.data.preferences import SHP
from rlhf_jax.data.prompts import OASST
from rlhf_report import appendix


def test_every_fault_names_a_test_that_there_is():
    code = "".join(path.read_text() for path in (PROJECT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", code, re.MULTILINE))
    assert set(appendix.faults_table()["test"]) <= there


def test_what_the_tests_measured_is_shown_and_within_its_limits():
    rows = appendix.tested_invariants_table()
    assert len(rows) > 10
    assert (rows["measured"].astype(float) <= rows["at most"].astype(float)).all()


def test_speed_is_shown_as_the_benchmarks_have_written_it(tmp_path, monkeypatch):
    row = {
        "work": "a step, steps/s",
        "speeds": {"jax float32": [3.0, 4.0, 5.0], "torch float32": [2.0, 2.0, 2.0]},
        "memory": {"jax float32": 1.0, "torch float32": 3.0},
    }
    head = "* machine   2 cores of a processor (avx2), 8 GB, Linux, load 0.1 at the start"
    (tmp_path / "bench.md").write_text(f"# Speed\n\n{head}\n\n{bench.table([row])}\n\n| other |\n")
    monkeypatch.setattr(appendix, "MEASURED", tmp_path)
    (shown,) = appendix.speed_table().to_dict("records")
    assert shown == {
        "work": "a step, steps/s", "jax float32": "4 (3 to 5)", "torch float32": "2",
        "float32, times": "2 (1.5 to 2.5)", "memory, times less": "3",
    }  # fmt: skip
    told = "Measured on 2 cores of a processor (avx2), 8 GB, Linux."
    assert appendix.machine("bench.md") == told


@pytest.mark.parametrize("name", ["growth.png", "learning_curves.png"])
def test_a_picture_that_was_measured_is_displayed(name, monkeypatch):
    """Not returned: renderers leave out what a cell with a picture returns."""
    shown = []
    monkeypatch.setattr(appendix, "display", shown.append)
    assert appendix.measured_picture(name) is None
    assert shown[0].data.startswith(b"\x89PNG") and len(shown[0].data) > 10_000


def runs_of(profile):
    """Runs as a profile would make them, as far as the table of the protocol reads them."""
    profile = profiles.profile(profile)
    source = {"name": "votes"}
    pairs, prompts = profile.reward.train_pairs, profile.ppo.prompts
    return [
        SimpleNamespace(
            config=json.loads(encode(dataclasses.asdict(cfg))),
            about={"preferences": source, "prompts": source},
            summary={"pairs": {"train": pairs}, "prompts": prompts},
        )
        for cfg in (profile.reward, profile.ppo, profile.lora, profile.evaluation)
    ]


ALWAYS = {"framework", "preferences", "prompts (prompter's)", "trained with LoRA"}


@pytest.mark.parametrize(
    ("profile", "departs"),
    [
        ("assignment", set()),
        ("study", {"training pairs", "reward epochs", "PPO learning rate, LoRA", "prompt tokens"}),
    ],
)
def test_the_table_explains_what_departs_from_the_protocol_and_nothing_else(profile, departs):
    rows = appendix.protocol_table(*runs_of(profile))
    explained = set(rows.loc[rows["why"] != "–", "setting"])
    assert departs <= explained - ALWAYS and (departs or explained == ALWAYS)
    asked = rows.set_index("setting")["protocol"]
    assert asked["training pairs"] == "at least 5,000" and asked["LoRA rank"] == "4 to 16"
    assert {asked["preferences"], asked["prompts (prompter's)"]} == {SHP, OASST}


def test_the_protocol_of_the_dcgan_is_told_from_a_shorter_training():
    cfg = json.loads(encode(dataclasses.asdict(PROFILES["assignment"])))
    for epochs, explained in ((1000.0, {"data"}), (12.345, {"data", "epochs"})):
        metrics = pd.DataFrame({"epoch": [epochs]})
        run = SimpleNamespace(
            config=cfg, summary={"source": "x"}, metrics=lambda metrics=metrics: metrics
        )
        rows = appendix.gan_protocol_table(run)
        assert set(rows.loc[rows["why"] != "–", "setting"]) == explained
        assert assignment.wanted("gan", "epochs") == "1,000"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "was not recorded"),
        ({"matmul_precision": "highest", "device": "gpu: x"}, "“highest”"),
        ({"matmul_precision": "default", "device": "gpu: x"}, "TF32"),
        ({"matmul_precision": "default", "device": "cpu: x"}, "computed in float32."),
    ],
)
def test_it_is_said_how_float32_products_were_computed(record, said):
    assert said in appendix.products_reading(SimpleNamespace(record=record))


def test_every_fault_names_a_test_that_exists():
    sources = "".join(path.read_text() for path in (PROJECT / "tests").rglob("test_*.py"))
    rows = appendix.faults_table()
    assert len(rows) > 10 and not rows.isna().any(axis=None)
    assert [name for name in rows["test"] if f"def {name}(" not in sources] == []
