"""The teacher's file is obeyed, and what is wrong in it is named."""

import subprocess
import sys

import pytest

from experiment_runs import assignment
from experiment_runs.assignment import ASSIGNMENT, PATH, PROTOCOL
from experiment_runs.configuration import made
from experiment_runs.errors import UserError
from experiment_runs.settings import PROJECT
from gan_jax import data
from rlhf_jax.config import PPOConfig, RewardConfig
from rlhf_jax.ratings.store import rubric
from rlhf_report import evaluation, ppo


def test_the_file_at_the_top_of_the_project_is_the_one_that_is_read():
    assert PATH.resolve() == PROJECT / "assignment.toml"


def test_band_rubric_and_images_are_those_of_the_file():
    assert evaluation.KL_BAND == ppo.KL_BAND == tuple(ASSIGNMENT["kl"]["band"]) == (0.02, 0.1)
    rows = rubric().set_index("criterion")
    for name, meanings in ASSIGNMENT["ratings"]["rubric"].items():
        assert list(rows.loc[name.replace("_", " / ")]) == meanings
    assert data.dataset_for("12") == ASSIGNMENT["submission"]["even"]
    assert data.dataset_for("13") == ASSIGNMENT["submission"]["odd"]


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("train_pairs", 5000, True), ("train_pairs", 9000, True), ("train_pairs", 4999, False),
        ("train_pairs", None, False), ("epochs", 5, True), ("epochs", 4, False),
    ],
)  # fmt: skip
def test_a_departure_is_a_value_that_the_protocol_does_not_allow(field, value, kept):
    config = assignment.values("reward") | {field: value}
    found = assignment.departures("reward", config)
    assert len(found) == (not kept)
    assert kept or (field in found[0] and str(value) in found[0] and "protocol says" in found[0])


def test_lists_and_ranges_are_compared_and_said_in_words():
    lora = {"targets": ["q_proj"], "rank": 17, "alpha": 32.0, "dropout": 0.2}
    assert assignment.departures("lora", lora) == [
        "targets is ['q_proj'], the protocol says q_proj, v_proj",
        "rank is 17, the protocol says 4 to 16",
    ]
    assert assignment.wanted("reward", "train_pairs") == "at least 5,000"
    assert assignment.wanted("gan", "widths") == "512, 256, 128, 64"
    assert assignment.values("gan")["widths"] == (512, 256, 128, 64)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("[kl]", "[kl", "cannot be read"),
        ("band = ", "bands = ", r"\[kl\] has no band"),
        ('"[0-9]+"', '"[0-9"', "student_id is no regular expression"),
        ("[submission]", "submission = 5\n[other]", "submission is 5, not a table"),
        ("[0.02, 0.1]", "3", r"\[kl\] band is 3"),
        ("[0.02, 0.1]", "[0.02]", r"\[kl\] band is .*two numbers"),
        ('"[0-9]+"', "9", r"\[submission\] student_id is 9"),
        ("value = 6000, ", "", r"\[protocol.reward\] train_pairs has no value"),
        ("from = 5000", "from = 'x'", r"\[protocol.reward\] train_pairs is .*write numbers"),
        ("[0.02, 0.1]", "[nan, 0.1]", r"\[kl\] band is .*two numbers"),
        ('"stanfordnlp/SHP"', "5", r"\[protocol.data\] preferences is 5"),
        ("passes = 5", "", r"\[protocol.ppo\] has no passes"),
        ("scores = [1, 3, 5]", "scores = [1, 'a']", r"\[ratings\] scores is .*from 1 to 5"),
        ("scores = [1, 3, 5]", "scores = [1, 5]", r"\[ratings.rubric\] coherence is .*2 scores"),
        ("value = 6000, ", "value = 9, ", r"\[protocol.reward\] train_pairs is .*lies"),
        ("from = 5000", "form = 5000", r"\[protocol.reward\] train_pairs is .*'from', 'to'"),
        (", from = 5000", "", r"\[protocol.reward\] train_pairs is .*'from', 'to' or both"),
        ("[0.02, 0.1]", "[0.1, 0.02]", r"\[kl\] band is .*the lower one first"),
        ("scores = [1, 3, 5]", "scores = [1, 1, 5]", r"\[ratings\] scores is .*each once"),
        ('"_HW2.html"', '""', r"\[submission\] page is ''"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, before, after, named):
    path = tmp_path / "assignment.toml"
    path.write_text(PATH.read_text().replace(before, after))
    with pytest.raises(UserError, match=f"assignment.toml: {named}"):
        assignment.read(path)


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (RewardConfig, {"learning_rte": 1.0}, "no field learning_rte; known are loss, "),
        (PPOConfig, {"batch": 10, "forward_batch": 4}, "batch=10 is not a multiple"),
    ],
)
def test_a_value_that_the_profile_cannot_have_names_its_place(kind, values, named):
    with pytest.raises(UserError, match=rf"the file: \[x\]: .*{named}"):
        made(kind, values, "the file: [x]")


def test_what_is_edited_in_the_file_is_what_is_trained(tmp_path):
    """Read in another process, from a copy that says something else."""
    path = tmp_path / "assignment.toml"
    text = PATH.read_text().replace("inner_epochs = 4", "inner_epochs = 3")
    path.write_text(text.replace("epochs = 1000", "epochs = 7").replace("0.02, 0.1", "0.03, 0.1"))
    code = (
        "import pathlib, sys; from experiment_runs import assignment\n"
        "tables = assignment.read(pathlib.Path(sys.argv[1]))\n"
        "assignment.PROTOCOL.update(tables['protocol'])\n"
        "from gan_jax.config import PROFILES; from rlhf_jax.profiles import profile\n"
        "print(profile('assignment').lora.inner_epochs, PROFILES['assignment'].epochs)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=PROJECT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "3 7\n"
    assert PROTOCOL["gan"]["epochs"] == 1000


def test_what_cannot_be_made_of_the_file_ends_the_program_with_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        assignment.needed(lambda: made(PPOConfig, {"batch": 10, "forward_batch": 4}, "the file"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: the file: ") and said.count("\n") == 1
