"""Prints what one device computes of every program, FLOPs as JSON, on 1, 2, 4 and 8 devices.

A process of its own, because the number of virtual devices is fixed when JAX starts. The loops of a
program make the same number of trips on any number of devices, so that their bodies, which count
once, compare as they are.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rlhf_jax import devices
from rlhf_jax.config import PPOConfig, RewardConfig
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.sampling import Responses, draw_keys, sample
from rlhf_jax.optimization.state import initial_state
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.actor_critic import build
from rlhf_jax.ppo.rollout import Frozen, Static
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.packing import PairBatch

BATCH, PROMPT, RESPONSE = 64, 32, 32
ROWS, TIME, PAIRS = 16, 64, 8


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    base = random_model()
    small = dataclasses.replace(base.config, embed_dim=32, mlp_dim=64, num_layers=1)
    base = dataclasses.replace(
        base, config=small, state=nnx.state(Decoder(small, rngs=nnx.Rngs(0)))
    )
    found: dict[str, dict[int, float]] = {}
    for count in (1, 2, 4, 8):
        mesh = jax.sharding.Mesh(jax.devices()[:count], ("batch",))
        devices.mesh = lambda mesh=mesh: mesh
        for name, lowered in programs(base).items():
            flops = lowered.compile().cost_analysis()["flops"]
            found.setdefault(name, {})[count] = flops
    print(json.dumps(found))


def programs(base):
    optimizer = optax.adam(1e-3)
    reward_model = reward_models.initial(base, 0)
    reward_def, reward_state = nnx.split(nnx.merge(*reward_model))
    tokens, mask = np.zeros((BATCH, PROMPT), np.int32), np.ones((BATCH, PROMPT), bool)
    keys = draw_keys(jax.random.key(0), range(BATCH))
    prompts = devices.over_devices((tokens, mask))
    responses = devices.over_devices(
        Responses(
            np.zeros((BATCH, RESPONSE), np.int32), np.ones((BATCH, RESPONSE), bool),
            np.zeros((BATCH, RESPONSE), np.float32),
        )
    )  # fmt: skip
    cfg = PPOConfig(batch=BATCH, forward_batch=16, prompts=BATCH)
    tuned = build(base, None, seed=0)
    frozen = Frozen(tuned.frozen, base.state, {"reward": reward_state})
    static = Static(
        tuned.definition, base.definition, (("reward", 1.0, reward_def),), optimizer, cfg,
        base.tokenizer.ends,
    )  # fmt: skip
    rows = np.zeros((4, ROWS, TIME), np.int32)
    index = np.zeros((3, 2 * PAIRS), np.int32)
    pairs = PairBatch(
        *rows, index[0], index[1], index[2, :PAIRS], index[2, PAIRS:], np.ones(PAIRS, np.float32)
    )
    return {
        "sampling": sample.lower(
            devices.replicated(base.state), *prompts, devices.over_devices(keys), 1.0,
            decoder_def=base.definition, length=RESPONSE, end=-1, pad=0,
        ),
        "PPO update": ppo_training.update.lower(
            initial_state(tuned.trainable, optimizer), devices.replicated(frozen), *prompts,
            responses, {}, jnp.float32(0.1), jax.random.key(0), static=static,
        ),
        "reward step": reward_training.update.lower(
            initial_state(reward_model[1], optimizer), devices.replicated(reward_model[2]),
            reward_training.placed(pairs), definition=reward_model[0], optimizer=optimizer,
            cfg=RewardConfig(),
        ),
    }  # fmt: skip


if __name__ == "__main__":
    main()
