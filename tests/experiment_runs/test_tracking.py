import dataclasses
import sys
import types

import pytest

from experiment_runs import hosts
from experiment_runs import run as runs
from experiment_runs.errors import UserError
from experiment_runs.tracking import tracker


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1


def two_steps(run):
    run.log(step=1, loss=2.0, histogram=[1, 2], tokens=7)
    run.log(step=2, loss=1.5)
    run.finish()


def ensured(root, train=two_steps, **options):
    return runs.ensure("stage", Config(), train, inputs={}, root=root, **options)


@pytest.fixture
def package(monkeypatch):
    """A function that puts a module of given members in the place of an optional package."""

    def put(name, **members):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_a_function_is_called_with_every_step_that_is_trained(tmp_path):
    seen = []
    for _ in range(2):  # the second time nothing is trained
        ensured(tmp_path, on_step=lambda step, row: seen.append((step, row["loss"])))
    assert seen == [(1, 2.0), (2, 1.5)]


def test_what_a_function_raises_ends_the_training_which_goes_on_later(tmp_path):
    def stop(step, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensured(tmp_path, on_step=stop)
    assert ensured(tmp_path, train=lambda run: run.finish()).finished


def test_tensorboard_gets_the_numbers_of_every_step_and_is_closed(tmp_path, monkeypatch, package):
    events = []

    class SummaryWriter:
        def __init__(self, folder):
            events.append(folder)

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            events.append("closed")

    package("tensorboardX", SummaryWriter=SummaryWriter)
    monkeypatch.setenv("RLHF_LOG_TO", "tensorboard")
    run = ensured(tmp_path)
    assert events == [
        str(run.path / "tensorboard"), ("loss", 2.0, 1), ("tokens", 7.0, 1), ("loss", 1.5, 2),
        "closed",
    ]  # fmt: skip


def test_of_several_processes_the_first_alone_tells_a_tracker(tmp_path, monkeypatch, package):
    package("trackio", init=lambda **options: pytest.fail("a second run of the same name"))
    monkeypatch.setenv("RLHF_LOG_TO", "trackio")
    monkeypatch.setattr(hosts, "first", lambda: False)
    with tracker(tmp_path, {}) as told:
        assert told is None


def test_event_files_of_tensorboard_are_written(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("RLHF_LOG_TO", "tensorboard")
    (file,) = (ensured(tmp_path).path / "tensorboard").iterdir()
    assert file.name.startswith("events.out") and b"loss" in file.read_bytes()


def test_trackio_gets_the_configuration_and_every_step_and_is_finished(
    tmp_path, monkeypatch, package
):
    seen = []
    theirs = types.SimpleNamespace(
        log=lambda row, step: seen.append((step, row)), finish=lambda: seen.append("finished")
    )
    package("trackio", init=lambda **options: seen.append(options) or theirs)
    monkeypatch.setenv("RLHF_LOG_TO", "trackio")
    path = ensured(tmp_path).path
    assert seen[0]["name"] == path.name and seen[0]["config"] == {"rate": 0.1}
    assert seen[1:] == [(1, {"loss": 2.0, "tokens": 7.0}), (2, {"loss": 1.5}), "finished"]


@pytest.mark.parametrize(
    ("asked", "missing"), [("tensorboard", "tensorboardX"), ("trackio", "trackio")]
)
def test_a_package_that_is_missing_is_one_message(tmp_path, monkeypatch, asked, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("RLHF_LOG_TO", asked)
    with pytest.raises(UserError, match=f"{missing} is not installed; pip install {missing}"):
        ensured(tmp_path, train=lambda run: pytest.fail("trained"))


def test_nothing_is_imported_where_nothing_is_asked_for(tmp_path, monkeypatch):
    for name in ("tensorboardX", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    assert ensured(tmp_path).finished
