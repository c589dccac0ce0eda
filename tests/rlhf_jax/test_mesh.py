"""Every program on meshes of virtual devices, against one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from experiment_runs import devices
from experiment_runs.checkpoints import Checkpoints
from experiment_runs.errors import UserError
from rlhf_jax.config import LINEAR_LAYERS, LoRAConfig
from rlhf_jax.language_model import sharding
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.state import initial_state
from rlhf_jax.ppo.actor_critic import build

SCRIPT = Path(__file__).with_name("mesh_programs.py")
# Bytes that may be gathered beside a matrix: one step's logits, of which a token is drawn; hidden
# states of a batch, which XLA gathers in place of a sum where no matrix of the base is trained.
BATCH_STATES = 4 * 64 * 32 * 16
STATES = {"sampling": 4 * 264 * 32, "reward LoRA": BATCH_STATES, "PPO LoRA": BATCH_STATES}
MESHES = [f"data={n // m},model={m}" for n in (8, 4, 2) for m in (1, 2, 4, 8) if m <= n]


@pytest.fixture(scope="module")
def found(request):
    """A function: what the script found of the programs on some meshes."""
    root = request.config.rootpath
    own = {
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "benchmarks"))),
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, SCRIPT, *arguments], env=os.environ | own, cwd=root,
            capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def check(found, meshes):
    """Same numbers, even shares, and no more gathered at a time than one matrix, or states of a
    batch."""
    one = found.pop("data=1,model=1")
    assert list(found) == meshes
    for mesh, programs in found.items():
        sizes = dict(part.split("=") for part in mesh.split(","))
        model, count = int(sizes["model"]), int(sizes["model"]) * int(sizes["data"])
        for name, row in programs.items():
            where = f"{name} on {mesh}"
            limit = 1e-4 if name == "GAN" else 1e-5  # two steps of Adam magnify rounding
            assert max(row["apart"].values()) < limit, where
            for share in ("flops", "bytes"):
                assert one[name][share] / count >= 0.85 * row[share], f"{share} of {where}"
            gathered = row["collectives"].get("all-gather", {}).get("largest", 0)
            least = STATES.get(name, 0) / int(sizes["data"])
            if name != "GAN":  # whose kernels are divided over both axes alike
                assert gathered <= max(one[name]["largest"] / model, least), where
            assert count == 1 or row["collectives"], where


@pytest.mark.parametrize("name", ["reward", pytest.param("PPO LoRA", marks=pytest.mark.slow)])
def test_a_step_on_a_mesh_is_that_of_one_device_in_even_shares(found, name):
    check(found("data=4,model=2", "--only", name), ["data=4,model=2"])


@pytest.mark.exhaustive
def test_every_program_on_every_mesh_is_that_of_one_device_in_even_shares(found):
    check(found(*MESHES), MESHES)


@pytest.mark.exhaustive
def test_blocks_in_one_loop_are_divided_as_well(found):
    meshes = ["data=4,model=2", "data=8,model=1"]
    check(found("--looped", *meshes), meshes)


def test_every_matrix_has_a_rule_and_hardly_a_byte_is_on_all_devices(model):
    """Of a policy with adapters on all linear layers and biases, and of its optimizer's state."""
    tuned = build(model, LoRAConfig(targets=LINEAR_LAYERS), seed=0)
    for tree in (tuned.trainable, tuned.frozen):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            axes = devices.kept_axes(path, x, RULES)
            assert x.ndim < 2 or min(x.shape) == 1 or "data" in str(axes), path


def test_what_data_divides_is_gathered_for_use_and_what_model_divides_first_is_not():
    used = {axes: devices.used_axes(jax.P(*axes)) for _, axes in RULES}
    assert used["model", "data"] == jax.P("model", None)
    assert used["data", "model"] == jax.P(None, "model")
    assert used[None, ("data", "model")] == jax.P(None, None)
    assert used[("model", "data"), None] == jax.P("model", None)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [("", (2, 1)), ("model=2", (1, 2)), ("data=1", (1, 1)), ("data=2,model=1", (2, 1))],
)
def test_a_mesh_is_what_is_asked_for_and_all_devices_on_data_by_default(monkeypatch, asked, shape):
    monkeypatch.setenv("RLHF_MESH", asked)
    assert (devices.mesh().shape["data"], devices.mesh().shape["model"]) == shape


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("data=4", "data=4,model=1 is of 4 devices, and there are 2; these fit: data=2,model=1, "),
        ("rows=2", "'rows=2': write data=4,model=2"),
        ("data=0", "'data=0': write"),
        (f"data={'9' * 5000}", "write data=4,model=2"),
        ("data=2,data=1", "write data=4,model=2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_those_that_can(monkeypatch, asked, told):
    monkeypatch.setenv("RLHF_MESH", asked)
    with pytest.raises(UserError, match=told):
        devices.mesh()


def test_sizes_that_do_not_divide_are_refused_with_the_meshes_that_would(monkeypatch, model):
    odd = {"embedding": np.zeros((259, 32))}
    monkeypatch.setenv("RLHF_MESH", "model=2")
    with pytest.raises(
        UserError, match=r"embedding \[259, 32\]: 259 over .*of 2 devices these do: data=2,model=1"
    ):
        devices.sharded(odd, RULES)
    config = type(model.config)(**vars(model.config) | {"num_kv_heads": 1})
    with pytest.raises(UserError, match="num_kv_heads=1 .* model=2; .* these do: data=2,model=1"):
        sharding.check(config)
    monkeypatch.setenv("RLHF_MESH", "data=2")
    sharding.check(config)
    with pytest.raises(UserError, match="batch=9 .* 2 devices; make it 8 or 10, or data one of 1 "):
        devices.check_divisible("PPOConfig.batch", 9)


def test_a_checkpoint_of_one_mesh_is_read_by_another(monkeypatch, tmp_path, model):
    monkeypatch.setenv("RLHF_MESH", "data=2")
    state = initial_state(model.state, optax.adam(1e-3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"best": 1})
    monkeypatch.setenv("RLHF_MESH", "data=1,model=2")
    step, found, notes = checkpoints.restore(initial_state(model.state, optax.adam(1e-3)))
    checkpoints.close()
    assert (step, notes) == (3, {"best": 1})
    jax.tree.map(np.testing.assert_array_equal, found, state)
    kernel = found.trainable["blocks"][0]["mlp"]["up_proj"]["kernel"][...]
    assert kernel.sharding.spec == jax.P("model", "data") and dict(kernel.sharding.mesh.shape) == {
        "data": 1, "model": 2,
    }  # fmt: skip


def test_rows_that_are_left_over_are_filled_up_with_the_first(monkeypatch):
    assert devices.filled(3).tolist() == [0, 1, 2, 0] and devices.filled(4).tolist() == [0, 1, 2, 3]
    monkeypatch.setenv("RLHF_MESH", "data=1")
    assert devices.filled(3).tolist() == [0, 1, 2]
