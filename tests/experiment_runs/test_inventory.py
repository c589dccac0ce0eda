import dataclasses
import json

import pytest

from experiment_runs import inventory
from experiment_runs import run as runs
from experiment_runs.errors import UserError
from experiment_runs.lock import locked
from experiment_runs.run import Run
from experiment_runs.settings import RESULTS

REFERENCE = RESULTS / "reference"


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


def made(root, stage="stage", rate=0.1, inputs=None, gain=1.0):
    def train(run):
        run.log(step=1, loss=2.0)
        run.finish(gain={"value": gain, "low": 0.5, "high": 1.5}, rows=[{"a": 1}], steps=3)

    return runs.ensure(
        stage, Config(rate=rate), train, inputs=inputs or {"data": "d1"}, root=root,
        about={"profile": {"name": "tiny", "promise": "so " * 50}},
    )  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    one = made(tmp_path, "ppo-full-with-a-name-that-is-longer-than-most")
    return one, made(tmp_path, rate=0.2, inputs={"upstream": one.identity}, gain=0.7)


def test_every_table_fits_a_terminal_of_sixty_columns(pair, tmp_path):
    tables = [
        inventory.listing(tmp_path),
        inventory.comparison(*pair),
        inventory.listing(REFERENCE),
    ]
    committed = inventory.runs_in(REFERENCE)
    tables += [inventory.description(run) for run in committed]
    tables += [inventory.comparison(*two) for two in zip(committed, committed[1:], strict=False)]
    for table in tables:
        longest = max(table.splitlines(), key=len)
        assert len(longest) <= 60 or " " not in longest.strip() or longest[1:3] == "  ", longest


def test_the_list_names_each_run_with_its_day_its_disk_and_its_state(pair, tmp_path, monkeypatch):
    one, other = pair
    (other.path / "summary.json").unlink()
    (other.path / "checkpoints").mkdir()
    (other.path / "checkpoints" / "weights").write_bytes(b"x" * 2_500_000)
    lines = inventory.listing(tmp_path).splitlines()[1:]
    assert lines[1].startswith("ppo-full-with-a-name-that-is-…") and lines[1].endswith(" finished")
    assert other.path.name in lines[2] and " 2.5 MB " in lines[2] and lines[2].endswith("cut off")
    assert one.record["started"][:10] in lines[1] and lines[3].startswith("2 runs, ")
    monkeypatch.setattr(runs, "NUMERICS", runs.NUMERICS + 1)
    assert inventory.state(Run(one.path)) == "older"
    (one.path / "config.json").write_text('{"stage"')
    assert inventory.listing(tmp_path).splitlines()[2].endswith("broken")


def test_a_description_says_how_a_run_was_made_and_what_it_found(pair):
    text = inventory.description(pair[1])
    for line in ("rate: 0.2", "sizes: 1, 2", "gain: 0.70 [0.50,1.50]", "steps: 3", "format: 1"):
        assert f"\n{line}\n" in f"{text}\n"
    assert f"fingerprint.upstream: {pair[0].identity}" in text and "rows" not in text


def test_a_comparison_shows_what_differs_and_nothing_else(pair):
    text = inventory.comparison(*pair)
    rows = {line[:25].strip(): line[26:].split() for line in text.splitlines()[3:] if line}
    assert rows["rate"] == ["0.1", "0.2"] and "sizes" not in rows and "steps" not in rows
    assert rows["gain"] == ["1.00", "[0.50,1.50]", "0.70", "[0.50,1.50]"]
    assert rows["fingerprint.data"] == ["d1", "-"] and "device" not in rows


def test_runs_of_a_gan_and_of_a_language_model_can_be_compared():
    gan, policy = (next(REFERENCE.glob(f"{stage}-*")) for stage in ("gan", "ppo-lora"))
    assert "spectral_norm" in inventory.comparison(Run(gan), Run(policy))


@pytest.mark.parametrize(
    ("answer", "yes", "left"), [("n", False, 2), ("", False, 2), ("y", False, 1), (None, True, 1)]
)
def test_a_run_is_removed_after_a_yes_only(pair, tmp_path, monkeypatch, capsys, answer, yes, left):
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert inventory.remove([pair[0].path], yes=yes) == 2 - left
    assert len(inventory.runs_in(tmp_path)) == left
    assert f"made from it: {pair[1].path.name}" in capsys.readouterr().out


def test_nobody_to_ask_means_no(pair, tmp_path, monkeypatch):
    def no_terminal(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_terminal)
    inventory.remove([run.path for run in pair])
    assert len(inventory.runs_in(tmp_path)) == 2


def test_what_is_not_a_run_is_never_removed(pair, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(pair[1].path)
    for path in (tmp_path / "precious", tmp_path / "link"):
        with pytest.raises(UserError, match="precious: not a run|link: a link"):
            inventory.remove([pair[0].path, path], yes=True)
    assert len(inventory.runs_in(tmp_path)) == 3  # both runs, one of them twice


def test_a_run_that_is_being_trained_is_not_removed(pair):
    busy = pytest.raises(UserError, match="is at work there")
    with locked(pair[0].path / "lock", wait=True), busy:
        inventory.remove([pair[0].path], yes=True)
    assert pair[0].summary


@pytest.mark.parametrize(
    "changed",
    [{"value": {}, "low": [], "high": "x"}, {"value": None, "low": 1, "high": True}, [], "x"],
)
def test_whatever_an_older_summary_holds_is_shown(pair, changed):
    run = pair[1]
    summary = {"identity": run.identity, "gain": changed, "parameters": changed}
    (run.path / "summary.json").write_text(json.dumps(summary))
    assert "state: finished" in inventory.description(Run(run.path))
