"""The command line: what is checked before anything is trained, and what ends with code 2."""

import pytest

from rlhf_jax import __main__ as command_line


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
    assert code == 2 and f"{folder}/rows.jsonl, line 1: not a JSON object" in said


def test_what_cannot_be_divided_is_told_by_a_dry_run(local_data, capsys):
    given = "run", "--dry-run", "--model", "random", "--data-dir", str(local_data())
    code, said = ended(capsys, *given, "--mesh", "data=2", "--ppo.forward-batch", "1")
    assert code == 2 and "PPOConfig.forward_batch=1 cannot be divided over 2 devices" in said


def test_a_folder_of_data_that_does_not_exist_is_told(capsys):
    code, said = ended(capsys, "check", "--data-dir", "/nowhere")
    assert code == 2 and "--data-dir /nowhere: no such folder" in said
