import dataclasses
import errno
import json
import os
import stat
import zipfile

import numpy as np
import pytest

from experiment_runs import files, inventory, process, provenance
from experiment_runs import run as runs
from experiment_runs.errors import UserError
from experiment_runs.run import Run
from experiment_runs.settings import RESULTS


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    name: str = "x"


def finish(run):
    run.log(step=1, loss=2.0)
    run.finish(loss=2.0)


def ensured(root, train=finish, config=None, stage="stage", inputs=None):
    return runs.ensure(stage, config or Config(), train, inputs=inputs or {"data": "d1"}, root=root)


def test_a_finished_run_is_returned_without_training(tmp_path):
    first = ensured(tmp_path)
    again = ensured(tmp_path, train=lambda run: pytest.fail("trained again"))
    assert again.path == first.path and again.finished
    assert again.summary == {"loss": 2.0}
    assert again.metrics().to_dict("records") == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "change", [{"config": Config(rate=0.2)}, {"inputs": {"data": "d2"}}, {"stage": "other"}]
)
def test_another_configuration_input_or_stage_is_another_run(tmp_path, change):
    assert ensured(tmp_path, **change).path != ensured(tmp_path).path


def test_the_order_of_inputs_does_not_matter(tmp_path):
    one = ensured(tmp_path, inputs={"a": "1", "b": "2"})
    assert ensured(tmp_path, inputs={"b": "2", "a": "1"}).path == one.path


def test_a_run_that_was_cut_off_is_handed_to_training_again(tmp_path):
    def cut_off(run):
        for step in (1, 2, 3):
            run.log(step=step, loss=step)
            run.sample(step=step, text="t")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensured(tmp_path, train=cut_off)

    def resume(run):
        run.rewind(2)
        assert list(run.metrics()["step"]) == [1, 2]
        assert [sample["step"] for sample in run.samples()] == [1, 2]
        run.finish()

    assert ensured(tmp_path, train=resume).finished


def test_the_checkpoints_to_resume_from_go_when_a_run_is_finished(tmp_path):
    def train(run):
        for name in ("resume", "best"):
            (run.checkpoints / name).mkdir(parents=True)
        run.finish()

    kept = ensured(tmp_path, train=train).checkpoints
    assert [path.name for path in kept.iterdir()] == ["best"]


def test_a_stage_that_forgets_to_finish_is_a_programming_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"without run\.finish"):
        ensured(tmp_path, train=lambda run: None)


def test_a_line_that_a_kill_left_half_written_is_dropped_on_resume(tmp_path):
    run = ensured(tmp_path)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: not JSON"):
        run.metrics()
    run.rewind(1)
    assert list(run.metrics()["step"]) == [1]


def test_the_record_says_what_made_the_run(tmp_path):
    run = ensured(tmp_path)
    record = json.loads((run.path / "config.json").read_text())
    assert record["stage"] == run.stage == "stage" and run.path.name.startswith("stage-")
    assert record["config"] == run.config == {"rate": 0.1, "name": "x"}
    assert record["inputs"] == {"data": "d1"} and record["identity"] == run.identity
    assert {"git", "code", "packages", "python", "device", "started"} <= set(record)
    assert set(record["packages"]) == set(provenance.PACKAGES)


def test_changed_sources_are_noticed(tmp_path):
    run = ensured(tmp_path)
    assert inventory.code_since(run) == "the same"
    record = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(record | {"code": "older"}))
    assert inventory.code_since(Run(run.path)) == "changed"


@pytest.mark.parametrize("name", ["FORMAT", "NUMERICS"])
def test_a_run_of_an_older_number_is_neither_continued_nor_taken_for_the_present_one(
    name, tmp_path, monkeypatch
):
    def cut_off(run):
        run.log(step=1, loss=1.0)
        raise KeyboardInterrupt

    older = ensured(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ensured(tmp_path, train=cut_off, inputs={"data": "d2"})
    monkeypatch.setattr(runs, name, getattr(runs, name) + 1)
    again = ensured(tmp_path)
    assert again.path != older.path and again.record[name.lower()] == older.record[name.lower()] + 1
    fresh = ensured(tmp_path, inputs={"data": "d2"})
    assert list(fresh.metrics()["loss"]) == [2.0]  # and no row of the run that was cut off
    assert inventory.code_since(older) == f"older {name.lower()}"
    assert inventory.code_since(again) == "the same"


def test_committed_runs_stay_readable_and_older_ones_are_shown_as_such(monkeypatch):
    monkeypatch.setattr(runs, "NUMERICS", 2)  # of some of them
    folders = [RESULTS / name for name in ("reference", "assignment", "collapse")]
    paths = [path for folder in folders for path in folder.glob("*/config.json")]
    committed = [Run(path.parent) for path in paths]
    older = [run for run in committed if run.record["numerics"] < runs.NUMERICS]
    assert len(committed) > 15 and 0 < len(older) < len(committed)
    for run in committed:
        assert run.finished and run.summary and run.config
        assert (inventory.code_since(run) == "older numerics") == (run in older)


def test_what_was_renamed_since_is_read_by_its_new_name(tmp_path):
    """A stage, an input, keys at any depth of the results, and names of arrays that hold it."""

    def older(run):
        run.save_arrays(**{"ppo.gold": np.arange(3), "golden": np.ones(1)})
        run.finish(gains={"ppo": {"gold": 0.5}}, text="gold")

    run = ensured(tmp_path, train=older, stage="gold", inputs={"gold": "abc"})
    assert run.stage == "second_reward" and run.path.name.startswith("gold-")
    assert run.record["inputs"] == {"second_reward": "abc"}
    assert run.summary == {"gains": {"ppo": {"second_reward": 0.5}}, "text": "gold"}
    assert set(run.arrays()) == {"ppo.second_reward", "golden"}
    assert inventory.find("second_reward", tmp_path).path == run.path


def test_committed_evaluations_show_the_second_reward():
    found = inventory.find("evaluate", RESULTS / "reference")
    assert all(own["second_reward"]["value"] for own in found.summary["gains"].values())
    assert "ppo-full.second_reward" in found.arrays()
    assert inventory.find("second_reward", RESULTS / "reference").summary["accuracy"]


def test_arrays_come_back_as_they_were(tmp_path):
    run = ensured(tmp_path)
    arrays = {"numbers": np.arange(6.0).reshape(2, 3), "texts": np.asarray(["a", "läng"])}
    run.save_arrays("scores", **arrays)
    found = run.arrays("scores")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_values_that_json_has_no_word_for_are_written_as_null_and_numbers(tmp_path):
    run = ensured(tmp_path, train=lambda run: run.finish(
        a=np.float32(0.5), b=float("nan"), c=np.arange(2), d={"e": (1, float("inf"))}
    ))  # fmt: skip
    assert run.summary == {"a": 0.5, "b": None, "c": [0, 1], "d": {"e": [1, None]}}


def test_texts_of_any_kind_survive_a_log(tmp_path):
    text = 'quote " newline \n separator \u2028 emoji 🙂 nul \x00'
    run = ensured(tmp_path)
    run.sample(step=1, text=text)
    run.sample(step=2, text="next")
    assert [sample["text"] for sample in run.samples()] == [text, "next"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="results cannot be written there"):
        ensured(tmp_path / "below")


def test_a_file_in_the_place_of_the_results_folder_is_named(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="results cannot be written there.*RLHF_RESULTS"):
        ensured(tmp_path / "results")


def test_the_results_folder_can_be_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RESULTS", str(tmp_path / "mine"))
    assert ensured(None).path.parent == tmp_path / "mine"


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run, it has no config.json"):
        Run(tmp_path)


def test_a_run_that_is_not_finished_says_so(tmp_path):
    run = ensured(tmp_path)
    (run.path / "summary.json").unlink()
    assert not run.finished
    with pytest.raises(UserError, match="summary.json: missing; the run is not finished"):
        _ = run.summary


def test_committed_runs_are_found_by_stage(tmp_path):
    run = ensured(tmp_path, stage="ppo-full")
    assert inventory.find("ppo-full", tmp_path).path == run.path
    with pytest.raises(UserError, match="no finished run of stage 'gan'; available: ppo-full"):
        inventory.find("gan", tmp_path)


def test_fingerprints_tell_contents_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    things = [
        "text", b"text", ["text"], {"a": 1}, 1, 1.5, None, np.arange(3), np.arange(3.0),
        np.arange(3).reshape(3, 1), tmp_path / "one", tmp_path / "two",
    ]  # fmt: skip
    marks = [files.fingerprint(thing) for thing in things]
    assert len(set(marks)) == len(marks) and all(len(mark) == 16 for mark in marks)
    assert files.fingerprint("a", "bc") != files.fingerprint("ab", "c")
    assert files.fingerprint(tmp_path / "one") == files.fingerprint(tmp_path / "one")


def test_progress_is_silent_where_nobody_watches(capsys):
    assert list(process.progress(range(3), label="counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_progress_shows_its_label_where_it_is_wanted(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_PROGRESS", "1")
    assert list(process.progress(range(3), label="counting")) == [0, 1, 2]
    assert "counting" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[1]", b"{}", b"\xff\xfe{\x00}\x00", b"{", b"[" * 10**5, b'{"loss": 2}'],
)
def test_a_run_whose_summary_is_damaged_is_neither_finished_nor_trained_over(tmp_path, content):
    path = ensured(tmp_path).path / "summary.json"
    path.write_bytes(content)
    assert not Run(path.parent).finished
    with pytest.raises(UserError, match="summary.json: "):
        _ = Run(path.parent).summary
    with pytest.raises(UserError, match="summary.json: .* or move .* elsewhere"):
        ensured(tmp_path, train=lambda run: pytest.fail("trained again"))


def test_the_summary_of_another_configuration_does_not_finish_a_run(tmp_path):
    one, two = ensured(tmp_path).path, ensured(tmp_path, config=Config(rate=0.2)).path
    (two / "summary.json").write_bytes((one / "summary.json").read_bytes())
    assert not Run(two).finished
    with pytest.raises(UserError, match="not of the configuration in config.json"):
        _ = Run(two).summary


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"stage": 1, "identity": "x"}']
)
def test_a_damaged_record_is_written_anew_and_the_run_goes_on(tmp_path, content, capsys):
    run = ensured(tmp_path)
    whole = run.record
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json: .*restore the file"):
        _ = Run(run.path).record
    again = ensured(tmp_path, train=lambda run: pytest.fail("trained again"))
    assert "config.json" in capsys.readouterr().err
    assert again.record | {"started": 0} == whole | {"started": 0}


@pytest.mark.parametrize(
    ("place", "value"),
    [("config", {"rate": 0.3, "name": "x"}), ("inputs", {"data": "d2"}), ("stage", "other"),
     ("format", None), ("numerics", "2"), ("numerics", 1)],
)  # fmt: skip
def test_a_record_of_which_anything_is_changed_is_not_taken_for_the_run(
    tmp_path, place, value, capsys
):
    """Not shown, not exported, not finished; where it is trained the record is written anew."""
    run = ensured(tmp_path)
    record = json.loads((run.path / "config.json").read_text())
    assert place in record and runs.identity_of(record) == run.identity
    (run.path / "config.json").write_text(json.dumps(record | {place: value}))
    assert not Run(run.path).finished
    with pytest.raises(UserError, match="config.json: .*restore the file"):
        _ = Run(run.path).config
    again = ensured(tmp_path, train=lambda run: pytest.fail("trained again"))
    assert again.config == run.config and "written anew" in capsys.readouterr().err


def test_the_record_of_another_run_is_written_anew(tmp_path):
    one, two = ensured(tmp_path).path, ensured(tmp_path, config=Config(rate=0.2)).path
    (two / "config.json").write_bytes((one / "config.json").read_bytes())
    assert ensured(tmp_path, config=Config(rate=0.2)).config["rate"] == 0.2


@pytest.mark.parametrize("end", [b'{"step": 2, "text": "l\xc3', b"\0" * 4096, b"7", b"null"])
def test_a_broken_end_of_a_log_is_cut_off_and_said(tmp_path, end, capsys):
    run = ensured(tmp_path)
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(whole + end)
    with pytest.raises(UserError, match="metrics.jsonl, line 2: not JSON"):
        run.metrics()
    run.rewind(1)
    assert (run.path / "metrics.jsonl").read_bytes() == whole
    assert "it was cut off and is left out" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"null", b"[1]", b"\xff", b'{"step": "1"}', b'{"loss": 1}'])
def test_a_line_that_is_damaged_inside_a_log_is_named(tmp_path, line):
    run = ensured(tmp_path)
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(line + b"\n" + whole)
    with pytest.raises(UserError, match="metrics.jsonl, line 1: .*remove the line"):
        run.rewind(1)


def test_damaged_arrays_are_named(tmp_path):
    run = ensured(tmp_path)
    run.save_arrays("scores", a=np.arange(100))
    content = bytearray((run.path / "scores.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (run.path / "scores.npz").write_bytes(content)
    with pytest.raises(UserError, match="scores.npz: not a readable npz file"):
        run.arrays("scores")


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "metrics.jsonl", "samples.jsonl", "arrays.npz"]
)
def test_what_is_no_regular_file_or_never_ends_is_not_read(tmp_path, name):
    """A pipe that nobody writes into would be waited for, an endless file would fill memory."""
    path = ensured(tmp_path).path / name

    def read():
        run = Run(path.parent)
        return run.record, run.summary, run.metrics(), run.samples(), run.arrays()

    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        read()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        read()
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)  # it takes no space
    with pytest.raises(UserError, match=f"{name}: .*(bytes, at most|not a readable npz)"):
        read()


def test_arrays_that_a_run_could_not_have_written_are_not_unpacked(tmp_path):
    run = ensured(tmp_path)
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**29 + 1,)}
    with (
        zipfile.ZipFile(run.path / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(2**9 + 1):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match="arrays.npz: does not fit: 536,870,913 bytes of arrays"):
        run.arrays()


def test_a_summary_of_which_a_value_was_changed_does_not_finish_a_run(tmp_path):
    run = ensured(tmp_path)
    path = run.path / "summary.json"
    summary = json.loads(path.read_text())
    for name in summary.keys() - {"identity", "content"}:
        path.write_text(json.dumps(summary | {name: "something else"}))
        assert not Run(run.path).finished
        with pytest.raises(UserError, match="summary.json: something in it was changed"):
            _ = Run(run.path).summary
    del summary["content"]  # as runs of before have it
    path.write_text(json.dumps(summary))
    assert Run(run.path).finished


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 1.0}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
        ("metrics.jsonl", None),
        ("samples.jsonl", '{"step": 1, "text": "no"}\n'),
        ("arrays.npz", {"scores": np.zeros(3)}),
    ],
)
def test_a_file_that_was_changed_after_the_end_is_not_shown(tmp_path, name, changed):
    """Nor one that is gone; what is not of the run may come and go."""

    def train(run):
        run.sample(step=1, text="yes")
        run.save_arrays(scores=np.ones(3))
        finish(run)

    run = ensured(tmp_path, train=train)
    (run.path / "times.jsonl").unlink()
    run.save_arrays("later", x=np.ones(3))
    read = {"metrics.jsonl": run.metrics, "samples.jsonl": run.samples, "arrays.npz": run.arrays}
    assert len(read[name]()) == 1 and len(run.arrays("later")) == 1
    if isinstance(changed, dict):
        run.save_arrays(**changed)
    elif changed:
        (run.path / name).write_text(changed)
    else:
        (run.path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: not as it was when the run was finished"):
        read[name]()


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400", "9" * 400])
def test_numbers_that_are_not_finite_are_no_json(tmp_path, value):
    run = ensured(tmp_path)
    (run.path / "samples.jsonl").write_text(f'{{"reward": {value}}}\n')
    with pytest.raises(UserError, match="samples.jsonl, line 1: .*not a finite number"):
        run.samples()


@pytest.mark.parametrize("depth", [101, 520, 10**4, 10**5])
def test_values_that_are_nested_without_end_are_one_message(tmp_path, depth):
    run = ensured(tmp_path)
    content = b'{"a": ' * depth + b"1" + b"}" * depth
    for name in ("config.json", "summary.json", "samples.jsonl"):
        (run.path / name).write_bytes(content)
    for read in (lambda: Run(run.path).record, lambda: run.summary, run.samples):
        with pytest.raises(UserError, match=r"not JSON \((nested more than 100|.*recursion)"):
            read()


def test_a_full_disk_is_one_message(tmp_path):
    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="cannot be written there .No space left.*RLHF_RESULTS"):
        ensured(tmp_path, train=full)


def test_another_error_of_the_system_is_not_blamed_on_the_results(tmp_path):
    def lost(run):
        raise ConnectionResetError("reset by peer")

    with pytest.raises(ConnectionResetError):
        ensured(tmp_path, train=lost)


def test_names_with_half_a_surrogate_pair_can_be_kept(tmp_path):
    name = "file\udcff.jsonl"
    run = ensured(tmp_path, train=lambda run: run.finish(name=name))
    run.sample(step=1, name=name)
    assert run.summary["name"] == run.samples()[0]["name"] == name
    assert len(files.fingerprint(name)) == 16


def test_a_log_that_ends_before_the_checkpoint_is_told(tmp_path):
    """As a power cut leaves it, or a folder that was copied without it."""

    def cut_off(run):
        for step in (1, 2):
            run.log(step=step, loss=1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensured(tmp_path, train=cut_off)
    with pytest.raises(UserError, match="metrics.jsonl: ends at step 2, .*of step 3; restore"):
        ensured(tmp_path, train=lambda run: run.rewind(3))
    (path,) = tmp_path.glob("stage-*")
    (path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: ends at step 0"):
        ensured(tmp_path, train=lambda run: run.rewind(1))
