"""What is saved comes back bit by bit, or is refused: never anything else."""

import errno
import gc
import itertools
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment_runs import checkpoints, devices, hosts, signals
from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.errors import Stopped, UserError

# What orbax leaves behind when a file that it reads is broken.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def collected():
    """What orbax leaves behind goes here, not in the tests that follow."""
    yield
    gc.collect()


def state_of(value):
    return {"w": jnp.arange(600.0).reshape(20, 30) * value, "step": jnp.asarray(int(value))}


def saved(folder, *steps):
    keeper = Checkpoints(folder)
    for step in steps:
        keeper.save(step, state_of(step), {"kl_weight": step / 3, "loss": float("inf")})
    keeper.close()
    return folder / "resume"


def restored(folder):
    keeper = Checkpoints(folder)
    found = keeper.restore(state_of(0))
    keeper.close()
    return found


def is_that_of(found, step):
    assert found[0] == step
    jax.tree.map(np.testing.assert_array_equal, found[1], state_of(step))
    assert found[2] == {"kl_weight": step / 3, "loss": float("inf")}
    return True


def every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_the_two_latest_states_are_kept(tmp_path):
    folder = saved(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    assert is_that_of(restored(tmp_path), 3)


def test_the_latest_state_is_that_of_the_most_steps_whatever_the_clock_says(tmp_path, monkeypatch):
    clock = itertools.count(2e9, -1e6)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    os.utime(saved(tmp_path, 1, 2, 3) / "3", (0, 0))
    assert is_that_of(restored(tmp_path), 3)


def test_a_flipped_bit_anywhere_is_the_older_state_or_no_difference(tmp_path):
    """A bit in every file of a checkpoint, at random: nothing but the saved states comes back."""
    whole = saved(tmp_path / "whole", 1, 2)
    random = np.random.default_rng(0)
    fallen_back = 0
    for number, path in enumerate(every_file(whole / "2")):
        for draw in range(2):
            own = tmp_path / f"{number}-{draw}"
            shutil.copytree(whole, own / "resume")
            flip(own / "resume" / path.relative_to(whole), int(random.integers(2**32)))
            found = restored(own)
            fallen_back += found[0] == 1
            assert is_that_of(found, found[0])
    assert fallen_back > 0


def test_a_state_that_reads_well_but_is_not_as_it_was_saved_is_passed_over(
    tmp_path, monkeypatch, capsys
):
    saved(tmp_path, 1, 2)
    sums = checkpoints.checksums

    def rotten(tree, notes=None):  # what a flipped bit in the numbers comes to
        tree = tree | {"w": tree["w"] + (tree["step"] == 2) * 1e-3}
        return sums(tree, notes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "checksums", rotten)
        assert is_that_of(restored(tmp_path), 1)
    said = capsys.readouterr().err
    assert "resume/2: damaged" in said and "goes on from step 1" in said
    assert every_file(tmp_path / "resume" / "damaged" / "2")  # it is not thrown away
    saved(tmp_path, 2)  # the step can be saved again
    assert is_that_of(restored(tmp_path), 2)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"),
     ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError(errno.EMFILE, "Too many open files"),
     ValueError("Gloo AllGather failed: Connection reset by peer")],
    ids=str,
)  # fmt: skip
def test_what_fails_for_once_damages_no_state(tmp_path, monkeypatch, error):
    """Neither the newer state is given up for the older one, nor do weights count as damaged."""
    saved(tmp_path, 1, 2)
    save_weights(tmp_path / "best", state_of(3))
    sums = checkpoints.checksums

    def failing(tree, notes=None):
        if int(tree["step"]) != 1:
            raise error
        return sums(tree, notes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "checksums", failing)
        patch.setattr(hosts, "lost", lambda error: bool(hosts.ENDED.search(str(error))))
        with pytest.raises(type(error)):
            restored(tmp_path)
        with pytest.raises(type(error)):
            load_weights(tmp_path / "best", state_of(0))
    assert is_that_of(restored(tmp_path), 2)


@pytest.mark.parametrize("damage", ["emptied", "removed", "foreign", "cut"])
def test_a_part_that_is_gone_cut_or_foreign_does_not_block_the_run(tmp_path, damage):
    whole = saved(tmp_path / "whole", 1, 2)
    for number, path in enumerate(every_file(whole / "2")):
        own = tmp_path / str(number)
        shutil.copytree(whole, own / "resume")
        broken = own / "resume" / path.relative_to(whole)
        if damage == "removed":
            broken.unlink()
        else:
            half = path.read_bytes()[: path.stat().st_size // 2]
            broken.write_bytes({"emptied": b"", "foreign": b"\xff\x00{[", "cut": half}[damage])
        found = restored(own)
        assert is_that_of(found, found[0])


def test_where_no_state_is_whole_one_message_says_what_to_do(tmp_path):
    folder = saved(tmp_path, 1, 2)
    for path in every_file(folder):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole.*step 2.*step 1.*remove") as error:
        restored(tmp_path)
    assert len(str(error.value)) < 1500 and folder.exists()


def test_a_flipped_bit_in_saved_weights_is_refused_or_no_difference(tmp_path):
    save_weights(tmp_path / "run" / "best", state_of(3))
    random = np.random.default_rng(1)
    refused = 0
    for number, path in enumerate(every_file(tmp_path / "run" / "best")):
        own = shutil.copytree(tmp_path / "run", tmp_path / str(number)) / "best"
        flip(own / path.relative_to(tmp_path / "run" / "best"), int(random.integers(2**32)))
        try:
            found = load_weights(own, state_of(0))
        except UserError as error:
            assert "damaged" in str(error) and "train this stage again" in str(error)
            refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, state_of(3))
    assert refused > 0


def test_numbers_that_change_in_saved_weights_are_named(tmp_path):
    save_weights(tmp_path / "best", state_of(3))
    path = tmp_path / "best" / checkpoints.CHECKSUMS
    sums = json.loads(path.read_text())
    path.write_text(json.dumps(sums | {"['w']": "0" * 16}))
    with pytest.raises(UserError, match=r"best: damaged \(1 parts are not .* first \['w'\]"):
        load_weights(tmp_path / "best", state_of(0))


def test_weights_that_were_read_may_be_used_on_any_mesh(tmp_path):
    save_weights(tmp_path / "best", state_of(3))
    found = load_weights(tmp_path / "best", state_of(0))
    assert len(jax.devices()) > 1
    with devices.placement():
        own = jax.tree.map(jnp.copy, found)
    jax.tree.map(np.testing.assert_array_equal, own, state_of(3))


def test_a_signal_saves_the_step_that_it_came_in(tmp_path):
    keeper = Checkpoints(tmp_path)
    with pytest.raises(Stopped) as stopped, signals.heard():
        keeper = Checkpoints(tmp_path)
        signals.hear(15, None)
        keeper.maybe_save(7, state_of(7), {"kl_weight": 7 / 3, "loss": float("inf")})
    assert stopped.value.number == 15
    assert is_that_of(restored(tmp_path), 7)


@pytest.mark.parametrize("named", ["abc", "-1", "nan", "inf"])
def test_an_interval_that_is_no_number_of_seconds_is_refused(tmp_path, monkeypatch, named):
    monkeypatch.setenv("RLHF_CHECKPOINT_SECONDS", named)
    with pytest.raises(UserError, match=f"RLHF_CHECKPOINT_SECONDS={named}: write a number"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_nothing_that_is_not_finite_is_saved_and_the_last_good_state_stays(tmp_path, wrong):
    good, bad = state_of(1), state_of(2)
    bad = jax.tree.map(lambda x: jnp.where(x == x.max(), wrong, x) if x.ndim else x, bad)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, good, {})
    with pytest.raises(FloatingPointError, match="step 2: .* not finite.*stays.*learning rate"):
        checkpoints.save(2, bad, {})
    step, state, _ = checkpoints.restore(good)
    checkpoints.close()
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, state, good)
    save_weights(tmp_path / "best", good)
    with pytest.raises(FloatingPointError, match="step 7: .* not finite"):
        save_weights(tmp_path / "best", bad, step=7)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "best", good), good)


def test_a_state_of_another_run_is_not_taken(tmp_path):
    """Somebody may have copied it there, to go on with other settings."""
    keeper = Checkpoints(tmp_path, "one")
    keeper.save(1, state_of(1), {})
    keeper.close()
    own, other = Checkpoints(tmp_path, "one"), Checkpoints(tmp_path, "another")
    with pytest.raises(UserError, match="resume/1: the state of another run.*remove this folder"):
        other.restore(state_of(0))
    assert own.restore(state_of(0))[0] == 1
    for keeper in (own, other):
        keeper.close()
