"""The command line: what is checked before anything is trained, and what ends with code 2."""

import contextlib

import pytest

from experiment_runs.lock import locked
from rlhf_jax import __main__ as command_line
from rlhf_jax import experiment
from rlhf_jax.ratings.store import RATINGS


def ended(capsys, *arguments):
    """Exit code and messages of a command."""
    with pytest.raises(SystemExit) as end:
        command_line.main([*arguments, "--profile", "tiny"])
    return end.value.code, capsys.readouterr().err


def test_all_inputs_are_read_without_a_run(local_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    command_line.main(["check", "--profile", "tiny", "--data-dir", str(local_data())])
    assert "inputs   read and checked" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["shp", "oasst"])
def test_an_input_of_a_late_stage_is_told_at_once(
    local_data, tmp_path, monkeypatch, capsys, folder
):
    monkeypatch.setenv("RLHF_RESULTS", str(tmp_path / "results"))
    data_dir = local_data()
    (data_dir / folder / "rows.jsonl").write_text("{")
    code, said = ended(capsys, "check", "--data-dir", str(data_dir))
    assert code == 2 and f"{folder}/rows.jsonl, line 1: not JSON" in said


def test_a_folder_of_data_that_does_not_exist_is_told(capsys):
    code, said = ended(capsys, "check", "--data-dir", "/nowhere")
    assert code == 2 and "--data-dir /nowhere: no such folder" in said


def test_what_uses_a_run_does_not_wait_for_it_and_what_trains_does(monkeypatch, capsys):
    waits = {}
    monkeypatch.setattr(
        command_line, "execute", lambda c: waits.update({type(c): c.experiment.wait})
    )
    for name in ("run", "reward", "evaluate", "rate", "chat", "export"):
        command_line.main([name, "--profile", "tiny"])
    assert {kind.__name__.lower(): wait for kind, wait in waits.items()} == {
        "all": True, "reward": True, "evaluate": True,
        "rate": False, "chat": False, "export": False,
    }  # fmt: skip


def test_a_rater_rates_in_one_place_at_a_time(tmp_path, monkeypatch, capsys):
    class Shown:
        path = tmp_path

        def samples(self):
            return []

    held = []

    @contextlib.contextmanager
    def watched(path, *, wait):
        held.append((path.name, wait))
        with locked(path, wait=wait):
            yield

    monkeypatch.setattr(experiment.Experiment, "run", lambda self, stage: Shown())
    monkeypatch.setattr(command_line, "announce", lambda experiment: None)
    monkeypatch.setattr(command_line, "locked", watched)
    for name in ("Ada", "Grace", "Ada"):
        command_line.main(["rate", "--profile", "tiny", "--rater", name])
    (ada, _), (grace, _), again = held
    assert again == (ada, False) and ada != grace
    assert not (tmp_path / RATINGS).exists()
