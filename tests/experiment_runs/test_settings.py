import re

import pytest

from experiment_runs import settings
from experiment_runs.errors import UserError

PACKAGES = ("experiment_runs", "rlhf_jax", "gan_jax", "rlhf_report")


def test_the_environment_is_read_in_one_place():
    """The one other use keeps transformers quiet and reads nothing of ours."""
    readers = {
        str(path.relative_to(settings.SOURCES))
        for name in PACKAGES
        for path in settings.SOURCES.glob(f"{name}/**/*.py")
        if re.search(r"\benviron\[|\benviron\.get|\bgetenv\b", path.read_text())
    }
    assert readers == {"experiment_runs/settings.py"}


def test_every_variable_is_explained_and_none_is_explained_that_is_not_read():
    text = (settings.SOURCES / "experiment_runs" / "settings.py").read_text()
    read = set(re.findall(r'(?:environ\.get\(|environ\[|is_set\()"(RLHF_[A-Z_]+)"', text))
    assert set(re.findall(r"^    (RLHF_[A-Z_]+) ", settings.__doc__, re.MULTILINE)) == read
    assert set(settings.SHOWN) <= read


def test_an_empty_variable_asks_for_nothing(monkeypatch):
    """The Makefile exports all of them."""
    for name in re.findall(r"RLHF_[A-Z_]+", settings.__doc__):
        monkeypatch.setenv(name, "")
    assert settings.profile() == "cpu" and settings.results() == settings.LOCAL
    for ask in (settings.model, settings.data_dir, settings.student_id, settings.last_name):
        assert ask() is None
    assert settings.committed() is None
    assert settings.asked() == dict.fromkeys(settings.SHOWN, "") | {"RLHF_PROFILE": "cpu"}
    assert settings.checkpoint_seconds() == 180
    assert not (settings.progress_wanted() or settings.submission() or settings.forced())


@pytest.mark.parametrize(
    ("name", "value", "ask", "message"),
    [
        ("RLHF_DATA_DIR", "nowhere", settings.data_dir, "DATA_DIR=nowhere: no such folder"),
        ("RLHF_RUN", "nothing", settings.committed, "RUN=nothing: .*there are: .*reference"),
        ("RLHF_CHECKPOINT_SECONDS", "soon", settings.checkpoint_seconds, "soon: write a number"),
        ("RLHF_LOG_TO", "paper", settings.log_to, "paper: unknown; say tensorboard or trackio"),
        ("RLHF_CHECKPOINT_SECONDS", "-1", settings.checkpoint_seconds, "-1: write a number"),
        ("RLHF_HUB_SECONDS", "nan", settings.hub_seconds, "RLHF_HUB_SECONDS=nan: write a number"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_remedy(name, value, ask, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ask()


def test_devices_that_jax_does_not_find_are_one_message(monkeypatch):
    """What it raises then may be an assertion without a word."""

    def fail():
        raise AssertionError

    monkeypatch.setattr(settings.jax, "default_backend", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda: JAX finds no such device"):
        settings.profile()


@pytest.mark.parametrize("name", ["RLHF_PREFERENCE", "RLHF_PROMPT", "RLHF_RESULT", "RLHF_DATADIR"])
def test_a_variable_that_is_nearly_one_of_them_is_told(monkeypatch, name):
    monkeypatch.setenv("RLHF_OF_SOMEBODY_ELSE", "1")
    settings.check()
    monkeypatch.setenv(name, "x")
    with pytest.raises(UserError, match=f"{name}: unknown; did you mean RLHF_"):
        settings.check()


def test_what_says_no_is_no(monkeypatch):
    for value, said in (("0", False), ("No", False), ("false", False), ("1", True), ("yes", True)):
        monkeypatch.setenv("RLHF_FORCE", value)
        assert settings.forced() == said


def test_results_may_lie_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RLHF_RESULTS", "~/runs")
    assert settings.results() == tmp_path / "runs"
