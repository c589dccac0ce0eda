"""Compiles, runs and measures every program on meshes of 8 virtual devices; prints JSON.

A process of its own, because the number of virtual devices is fixed when JAX starts:

    PYTHONPATH=benchmarks python mesh_programs.py [--looped] [--only reward] data=4,model=2 ...

Every mesh is compared with one device, in float32 and with the responses given, since rounding
would flip samples. With --looped the blocks are passed in one loop, as on accelerators.
"""

import argparse
import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hlo import collectives, flops

from experiment_runs import devices
from gan_jax import training as gan_training
from gan_jax.config import GANConfig
from rlhf_jax.baselines import dpo
from rlhf_jax.config import DPOConfig, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.evaluation.policies import sequence_kl
from rlhf_jax.language_model import layer_loop
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.sampling import Responses, begun, draw_keys
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.state import initial_state
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.actor_critic import build
from rlhf_jax.ppo.rollout import Frozen, Static
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.packing import PairBatch

ONE = "data=1,model=1"
BATCH, PROMPT, RESPONSE = 32, 16, 16
ROWS, TIME, PAIRS = 16, 32, 8
LORA = LoRAConfig(targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), dropout=0.0)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def main(meshes: list[str], *, looped: bool, only: list[str] | None) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    layer_loop.looped = lambda: looped
    base, found, one = wide_model(), {}, {}
    for mesh in [ONE, *meshes]:
        os.environ["RLHF_MESH"] = mesh
        with devices.placement():
            for name in only or PROGRAMS:
                function, arguments, static = PROGRAMS[name](base)
                program = function.lower(*arguments, **static).compile()
                row = measured(program.as_text(), arguments)
                dynamic = arguments[:-1] if name == "sampling" else arguments
                own = returned(name, program(*dynamic))
                row["apart"] = apart(own, one.setdefault(name, own))
                found.setdefault(mesh, {})[name] = row
                jax.clear_caches()
    print(json.dumps(found))


def wide_model():
    """Two layers whose every size can be divided by eight."""
    base = random_model()
    config = dataclasses.replace(
        base.config, vocab_size=264, embed_dim=64, mlp_dim=128, num_heads=8, num_kv_heads=8,
        tied_embeddings=False, qk_norm=True,
    )  # fmt: skip
    state = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, state)  # far from uniform
    return dataclasses.replace(base, config=config, state=state)


def sampling(base):
    """A function, its arguments on the mesh, its static arguments."""
    prompts, _ = episodes(base)
    keys = devices.over_devices(draw_keys(jax.random.key(0), range(BATCH)))
    return (
        begun, (devices.sharded(base.state, RULES), *prompts, keys, 1.0),
        {"decoder_def": base.definition, "length": RESPONSE, "end": -1, "pad": 0},
    )  # fmt: skip


def evaluation(base):
    prompts, responses = episodes(base)
    states = (devices.sharded(state, RULES) for state in (shaken(base.state), base.state))
    static = {"definitions": (base.definition, base.definition), "forward_batch": 16}
    return sequence_kl, (*states, *prompts, responses, 1.0), static


def ppo(base, lora=None):
    cfg = PPOConfig(
        batch=BATCH, forward_batch=16, prompts=BATCH, lora=lora, inner_epochs=2,
        approx_kl_limit=1e9, kl_weight=0.1,
    )  # fmt: skip
    reward_def, reward_state = nnx.split(nnx.merge(*reward_models.initial(base, 0)))
    tuned = build(base, lora, seed=0)
    static = Static(
        tuned.definition, base.definition, (("reward", 1.0, reward_def),), OPTIMIZER, cfg,
        base.tokenizer.ends,
    )  # fmt: skip
    prompts, responses = episodes(base)
    frozen = Frozen(tuned.frozen, base.state, {"reward": reward_state})
    arguments = (
        initial_state(shaken(tuned.trainable), OPTIMIZER), devices.sharded(frozen, RULES), *prompts,
        responses, {}, jnp.float32(0.1), jax.random.key(0),
    )  # fmt: skip
    return ppo_training.update, arguments, {"static": static}


def preferences(base):
    """The step of DPO on pairs of a prompt and two replies, each a quarter of the row or less."""
    rng = np.random.default_rng(0)
    shape = PAIRS, 2, TIME
    ends = rng.integers(TIME // 2, 3 * TIME // 4, (PAIRS, 2, 1))
    mask = np.arange(TIME) < ends
    reply = mask & (np.arange(TIME) >= TIME // 2)
    tokens = np.where(mask, rng.integers(0, 256, shape), base.tokenizer.pad).astype(np.int32)
    arguments = (
        initial_state(shaken(base.state), OPTIMIZER), devices.sharded(base.state, RULES),
        devices.over_devices(dpo.PairRows(tokens, mask, reply)),
    )  # fmt: skip
    cfg = DPOConfig(batch_pairs=PAIRS, forward_pairs=PAIRS)
    static = {"definition": base.definition, "optimizer": OPTIMIZER, "cfg": cfg}
    return dpo.update, arguments, static


def reward(base, lora=None):
    definition, trainable, frozen = reward_models.initial(base, 0, lora)
    trainable = shaken(trainable) if lora else trainable
    arguments = (
        initial_state(trainable, OPTIMIZER), devices.sharded(frozen, RULES),
        reward_training.placed(pairs()),
    )  # fmt: skip
    static = {"definition": definition, "optimizer": OPTIMIZER, "cfg": RewardConfig(lora=lora)}
    return reward_training.update, arguments, static


def gan(_):
    cfg = GANConfig(batch=16, widths=(32, 16, 8, 8), latents=16)
    networks, state = gan_training.initial(cfg, 1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, cfg.side, cfg.side, 1)).astype(np.uint8)
    order = gan_training.order_of(0, 2, len(images), cfg)
    arguments = *gan_training.placed(state, images), order, 0, jax.random.key(0)
    return gan_training.updates, arguments, {"networks": networks, "cfg": cfg}


PROGRAMS = {
    "sampling": sampling,
    "evaluation": evaluation,
    "PPO full": ppo,
    "PPO LoRA": functools.partial(ppo, lora=LORA),
    "reward": reward,
    "reward LoRA": functools.partial(reward, lora=LoRAConfig(rank=8, dropout=0.0)),
    "DPO": preferences,
    "GAN": gan,
}


def episodes(base):
    """Prompts padded on the left and responses padded on the right, on the mesh."""
    rng = np.random.default_rng(0)
    mask = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, BATCH)[:, None]
    tokens = np.where(mask, rng.integers(0, 256, mask.shape), base.tokenizer.pad).astype(np.int32)
    response_mask = np.arange(RESPONSE)[None] < rng.integers(1, RESPONSE + 1, BATCH)[:, None]
    responses = Responses(
        rng.integers(0, 256, response_mask.shape).astype(np.int32), response_mask,
        np.zeros(response_mask.shape, np.float32),
    )  # fmt: skip
    return devices.over_devices((tokens, mask)), devices.over_devices(responses)


def shaken(tree):
    """The same a little off, so that policy and reference differ and no adapter is zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape).astype(np.float32), tree)


def pairs() -> PairBatch:
    """Rows of two posts with two replies each."""
    rng = np.random.default_rng(0)
    segments = np.repeat([0, 1, 2], [TIME // 4, TIME // 8, TIME // 8])
    rows = [
        rng.integers(0, 256, (ROWS, TIME)), np.tile(np.repeat([0, 1], TIME // 2), (ROWS, 1)),
        np.tile(segments, (ROWS, 2)), np.tile(np.arange(TIME // 2), (ROWS, 2)),
    ]  # fmt: skip
    end_row = np.repeat(np.arange(PAIRS), 2) * ROWS // PAIRS
    end_column = np.tile([3 * TIME // 8 - 1, TIME // 2 - 1], PAIRS)
    replies = np.arange(2 * PAIRS).reshape(2, -1, order="F")
    index = (x.astype(np.int32) for x in (end_row, end_column, *replies))
    return PairBatch(*(x.astype(np.int32) for x in rows), *index, np.ones(PAIRS, np.float32))


def returned(name: str, results) -> dict[str, np.ndarray]:
    """Everything that one call returns, on the host."""
    if name == "sampling":  # later tokens may flip
        results = results.responses.logprobs[:, 0]
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(results)
    }
    leaves.pop("[1]['first_ratio_error']", None)  # is rounding and nothing else
    return leaves


def apart(own, one) -> dict[str, float]:
    """The norm of the difference as a share of the norm, of every array."""
    return {
        path: float(np.linalg.norm(x - one[path]) / max(np.linalg.norm(one[path]), 1e-3))
        for path, x in own.items()
    }


def measured(text: str, arguments) -> dict:
    """FLOPs and bytes of parameters of one device, and the program's collectives."""
    weights = [x for x in jax.tree.leaves(arguments[:2]) if jnp.issubdtype(x.dtype, jnp.floating)]
    return {
        "flops": flops(text),
        "bytes": sum(x.addressable_shards[0].data.nbytes for x in weights),
        "largest": max(x.nbytes for x in weights),
        "collectives": collectives(text),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--looped", action="store_true")
    parser.add_argument("--only", nargs="+")
    asked = parser.parse_args()
    main(asked.meshes, looped=asked.looped, only=asked.only)
