import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiment_runs import devices
from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.errors import UserError
from rlhf_jax.optimization import state as train_state
from rlhf_jax.optimization.optimizer import FROZEN, decayed_adam, linear_schedule, optimizer_for
from rlhf_jax.optimization.state import TrainState


def test_frozen_parameters_get_no_update_though_their_gradient_is_large():
    params = {"trained": jnp.ones(3), "head": jnp.ones(2), "kept": jnp.ones(4)}
    group = {"trained": "slow", "head": "fast", "kept": FROZEN}
    optimizer = optimizer_for(
        {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, lambda path: group[path[0].key],
        clip_norm=1e9,
    )  # fmt: skip
    grads = jax.tree.map(lambda x: 100 * x, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["trained"], -10)
    np.testing.assert_allclose(updates["head"], -100)
    assert not updates["kept"].any()


def test_the_norm_that_is_clipped_is_that_of_all_groups_together():
    optimizer = optimizer_for(
        {"a": optax.sgd(1.0), "b": optax.sgd(1.0)}, lambda path: path[0].key, clip_norm=1.0
    )
    grads = {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)
    assert float(updates["a"][0]) == pytest.approx(-0.6, rel=1e-5)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    schedule = linear_schedule(2.0, 20, 0.2)
    rates = [float(schedule(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    assert max(rates) == rates[4] == 2.0 and rates[20] == 0.0
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert math.isclose(float(linear_schedule(2.0, 20, 0.0)(0)), 2.0)


def test_the_first_value_that_is_not_finite_stops_the_run_by_name():
    train_state.check_finite(1, loss=0.0)
    with pytest.raises(FloatingPointError, match="step 7: kl is nan"):
        train_state.check_finite(7, loss=1.0, kl=float("nan"))


def state_of(value):
    params = {"w": jnp.full((4, 3), value), "b": jnp.full(3, value)}
    return TrainState(params, optax.adam(0.1).init(params), jnp.asarray(int(value)))


def test_the_latest_checkpoint_comes_back_bit_by_bit_with_its_notes(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHECKPOINT_SECONDS", "0")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state_of(0.0)) is None
    for step in (1, 2):
        checkpoints.maybe_save(step, state_of(step / 3), {"kl_weight": 0.1 * step, "none": None})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    step, state, notes = again.restore(state_of(0.0))
    again.close()
    assert step == 2 and notes == {"kl_weight": 0.2, "none": None}
    assert jax.tree.structure(state) == jax.tree.structure(state_of(0.0))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2 / 3))


def test_no_checkpoint_is_written_before_its_time(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHECKPOINT_SECONDS", "1000")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.maybe_save(1, state_of(1.0), {})
    assert checkpoints.restore(state_of(0.0)) is None
    checkpoints.close()


def test_saved_weights_replace_older_ones(tmp_path):
    for value in (1.0, 2.0):
        save_weights(tmp_path / "best", {"w": jnp.full(3, value)})
    found = load_weights(tmp_path / "best", {"w": jnp.zeros(3)})
    np.testing.assert_array_equal(found["w"], [2.0, 2.0, 2.0])


def test_weights_survive_a_kill_between_the_two_renames_of_a_save(tmp_path):
    save_weights(tmp_path / "best", {"w": jnp.ones(3)})
    (tmp_path / "best").rename(tmp_path / "best.new")
    found = load_weights(tmp_path / "best", {"w": jnp.zeros(3)})
    np.testing.assert_array_equal(found["w"], [1.0, 1.0, 1.0])


def test_batches_are_divided_over_the_devices_and_states_are_on_all_of_them():
    assert len(jax.devices()) == 2
    even = devices.over_devices(np.arange(8))
    assert [shard.data.shape for shard in even.addressable_shards] == [(4,), (4,)]
    state = devices.replicated({"w": jnp.arange(5)})["w"]
    assert [shard.data.shape for shard in state.addressable_shards] == [(5,), (5,)]


def test_a_batch_that_does_not_divide_over_the_devices_is_refused_by_name():
    with pytest.raises(UserError, match="batch=3 cannot be divided over 2 devices"):
        devices.over_devices((np.arange(8), np.arange(3)))
    with pytest.raises(UserError, match="PPOConfig.batch=9 .* 2 devices; make it 8 or 10"):
        devices.check_divisible("PPOConfig.batch", 9)


def test_weight_decay_falls_on_matrices_alone():
    params = {"matrix": jnp.ones((2, 3)), "norm": jnp.ones(3), "bias": jnp.ones(2)}
    optimizer = decayed_adam(0.1, 0.5)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    assert not updates["norm"].any() and not updates["bias"].any()
