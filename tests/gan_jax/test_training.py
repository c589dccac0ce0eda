"""Training: one compiled step is two plain updates, and a cut-off run loses nothing."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiment_runs.run import ensure
from gan_jax import training
from gan_jax.config import GANConfig


@pytest.fixture(scope="module")
def step(tiny):
    """One update of freshly drawn networks: what went in and what came out."""
    networks, state = training.initial(tiny, channels=3)
    random = np.random.default_rng(7)
    real = jnp.float32(random.uniform(-1, 1, (tiny.batch, 28, 28, 3)))
    latents = jnp.float32(random.normal(size=(tiny.batch, tiny.latents)))
    after = update(networks, tiny)(state, real, latents, jax.random.key(8))
    return networks, state, real, latents, *after


@functools.cache
def update(networks, cfg):
    return jax.jit(functools.partial(training.update, networks=networks, cfg=cfg))


def test_one_step_equals_two_plain_updates_one_after_the_other(step, tiny):
    """The reference runs the generator twice and knows nothing of shared forward passes."""
    networks, state, real, latents, after, metrics = step
    adam = optax.adam(2e-4, b1=0.5, b2=0.999)

    def module(which, params):
        statistics = getattr(state, which).statistics
        return nnx.merge(getattr(networks, which), params, statistics, copy=True)

    def loss_d(params):
        discriminator = module("discriminator", params)
        fake = module("generator", state.generator.params)(latents, train=True)
        on_real = jax.nn.sigmoid(discriminator(real, train=True))
        on_fake = jax.nn.sigmoid(discriminator(fake, train=True))
        return -jnp.log(on_real).mean() - jnp.log(1 - on_fake).mean()

    def loss_g(params):
        fake = module("generator", params)(latents, train=True)
        return -jnp.log(jax.nn.sigmoid(module("discriminator", stepped)(fake, train=True))).mean()

    @jax.jit
    def descended(network, grads):
        updates, _ = adam.update(grads, adam.init(network.params), network.params)
        return optax.apply_updates(network.params, updates)

    value_d, grads = jax.jit(jax.value_and_grad(loss_d))(state.discriminator.params)
    stepped = descended(state.discriminator, grads)
    value_g, grads = jax.jit(jax.value_and_grad(loss_g))(state.generator.params)
    np.testing.assert_allclose(metrics["loss_d"], value_d, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_g"], value_g, rtol=1e-4)
    # Adam's first step is 2e-4 in each coordinate whatever the gradient: compare its direction
    for found, expected in (
        (after.discriminator.params, stepped),
        (after.generator.params, descended(state.generator, grads)),
    ):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        agreement = np.concatenate([np.ravel(np.abs(a - b) < 1e-5) for a, b in pairs])
        assert agreement.mean() > 0.995


def test_each_network_takes_exactly_one_step_of_its_optimizer(step):
    after = step[4]
    for network in after:
        assert [int(count) for count in counts(network.opt_state)] == [1]


def counts(opt_state):
    return [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == ()]


def test_the_discriminators_statistics_see_real_then_generated_images_once(step):
    networks, state, real, latents, after, _ = step

    @jax.jit
    def seen(state):
        generator = nnx.merge(networks.generator, *state.generator[:2], copy=True)
        discriminator = nnx.merge(networks.discriminator, *state.discriminator[:2], copy=True)
        discriminator(real, train=True)
        discriminator(generator(latents, train=True), train=True)
        return nnx.state(discriminator, nnx.BatchStat)

    expected = jax.tree.leaves(seen(state))
    found = jax.tree.leaves(after.discriminator.statistics)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_cross_entropy_with_a_smoothed_target():
    logits = np.array([-2.0, 0.5, 3.0], np.float32)
    score = 1 / (1 + np.exp(-logits))
    expected = -(0.9 * np.log(score) + 0.1 * np.log(1 - score)).mean()
    np.testing.assert_allclose(
        training.cross_entropy(jnp.asarray(logits), 0.9), expected, rtol=1e-5
    )


def test_many_steps_in_one_call_are_single_steps_in_turn(step, tiny, squares):
    networks, state = step[:2]
    count, key = tiny.dispatch_steps, jax.random.key(3)
    order = training.order_of(0, count, len(squares.train), tiny)
    apart = state
    stream = jax.random.fold_in(key, training.LATENTS)
    for number in range(count):
        latents = jax.random.normal(jax.random.fold_in(stream, number), (tiny.batch, tiny.latents))
        apart, _ = update(networks, tiny)(
            apart, training.to_unit(squares.train[order[number]]), latents, jax.random.key(8)
        )
    copy = jax.tree.map(jnp.copy, state)
    together, _ = training.updates(copy, squares.train, order, 0, key, networks=networks, cfg=tiny)
    moved = np.concatenate([np.ravel(a - b) for a, b in leaf_pairs(apart, state)])
    error = np.concatenate([np.ravel(a - b) for a, b in leaf_pairs(apart, together)])
    assert np.abs(error).mean() < 0.02 * np.abs(moved).mean()


def leaf_pairs(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


def test_every_epoch_shows_every_image_at_most_once_in_a_new_order():
    cfg = GANConfig(batch=10)
    order = training.order_of(0, 20, 105, cfg).reshape(2, -1)
    assert all(len(np.unique(epoch)) == 100 for epoch in order)
    assert not np.array_equal(*order)
    np.testing.assert_array_equal(training.order_of(13, 7, 105, cfg).ravel(), order.ravel()[130:])


def test_bytes_and_numbers_are_inverse():
    values = np.arange(256, dtype=np.uint8)
    assert training.to_unit(values).min() == -1 and training.to_unit(values).max() == 1
    np.testing.assert_array_equal(training.to_bytes(training.to_unit(values)), values)


def trained(root: Path, cfg, images):
    """State and frames of a run under `root`, and its metrics file."""
    result = {}

    def work(run):
        result["state"], result["frames"] = training.train(run, cfg, images)[1:]
        run.finish()

    run = ensure("gan", cfg, work, inputs={}, root=root)
    return (
        jax.tree.leaves(result["state"]),
        result["frames"],
        (run.path / "metrics.jsonl").read_text(),
    )


OPTIONS = {
    "plain": {},
    "options": {"spectral_norm": True, "augmentation": ("colour", "translation", "cutout")},
}


@pytest.mark.parametrize("options, cut_at", [("plain", 4), ("plain", 8), ("options", 8)])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    tiny, squares, whole, tmp_path, monkeypatch, options, cut_at
):
    """Cut before the first checkpoint (at step 4) and after it."""
    cfg, whole = dataclasses.replace(tiny, **OPTIONS[options]), whole(options)
    log = training.log

    def power_cut(run, step, epoch, metrics):
        log(run, step, epoch, metrics)
        if step == cut_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "log", power_cut)
        trained(tmp_path, cfg, squares)
    resumed = trained(tmp_path, cfg, squares)
    assert resumed[2] == whole[2]
    np.testing.assert_array_equal(resumed[1], whole[1])
    for a, b in zip(resumed[0], whole[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(tiny, squares, tmp_path_factory):
    @functools.cache
    def run(options):
        cfg = dataclasses.replace(tiny, **OPTIONS[options])
        return trained(tmp_path_factory.mktemp(options), cfg, squares)

    return run


def test_each_step_iterates_the_directions_once_whatever_is_judged(tiny, squares):
    cfg = dataclasses.replace(tiny, spectral_norm=True)
    networks, state = training.initial(cfg, channels=3)
    images = training.to_unit(squares.train[: cfg.batch])
    latents = jnp.zeros((cfg.batch, cfg.latents))
    after, _ = update(networks, cfg)(state, images, latents, jax.random.key(8))
    pairs = zip(
        kernels(state.discriminator.params), leaves(after.discriminator.statistics), strict=True
    )
    for kernel, found in pairs:
        matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
        expected = matrix.T @ matrix @ np.ones(kernel.shape[-1])
        np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-5)


def kernels(params):
    return [leaf for leaf in leaves(params) if leaf.ndim == 4]


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_kill_9_loses_nothing(tmp_path):
    options = "--profile tiny --dataset histology --most-steps 120 --checkpoint-steps 12"
    command = [sys.executable, "-m", "gan_jax", "train", *options.split()]

    def launch(name):
        env = {
            "RLHF_RESULTS": str(tmp_path / name),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "XLA_FLAGS": "",  # compiled for speed, whatever the tests are compiled for
        }
        return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.DEVNULL)

    assert launch("whole").wait() == 0
    killed = launch("killed")
    deadline = time.monotonic() + 300
    while len(lines(tmp_path / "killed")) < 15 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 15 <= len(lines(tmp_path / "killed")) < 30
    assert launch("killed").wait() == 0
    for name in ("metrics.jsonl", "generator.safetensors", "summary.json"):
        (whole,), (resumed,) = ((tmp_path / d).glob(f"*/{name}") for d in ("whole", "killed"))
        assert whole.read_bytes() == resumed.read_bytes(), name


def lines(root: Path) -> list[str]:
    return [line for path in root.glob("*/metrics.jsonl") for line in path.read_text().split("\n")]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(finished):
    with pytest.raises(FloatingPointError, match="step 20: loss_g is nan"):
        training.log(finished, 20, 1.0, {"loss_g": jnp.array(jnp.nan)})


def test_frames_cover_the_first_and_the_last_dispatch():
    cfg = GANConfig(dispatch_steps=10, frames=5)
    steps = training.frame_steps(cfg, 1000)
    assert steps[0] == 10 and steps[-1] == 1000 and len(steps) == 5
    assert all(step % 10 == 0 for step in steps)
