"""The real programs of models of several sizes and their arguments: shapes, or arrays of zeros."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiment_runs import devices
from rlhf_jax.config import EvaluationConfig, PPOConfig, RewardConfig
from rlhf_jax.evaluation.policies import sequence_kl
from rlhf_jax.language_model.decoder import for_products
from rlhf_jax.language_model.decoder_config import DecoderConfig
from rlhf_jax.language_model.sampling import Responses, begun
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.state import TrainState
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.ppo.actor_critic import build
from rlhf_jax.ppo.rollout import Frozen, Static
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tensor_names import abstract
from rlhf_jax.pretrained.tokenizer import byte_tokenizer
from rlhf_jax.reward_model import model as reward_models
from rlhf_jax.reward_model import training as reward_training
from rlhf_jax.reward_model.packing import PairBatch

QWEN = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {  # name: fields of its config.json
    "135M": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "0.6B": QWEN | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "1.7B": QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4B": QWEN | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "8B": QWEN | {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip


def model(name: str, dtype: str = "float32", *, zeros: bool = False) -> Pretrained:
    """A model of that size, all of whose arrays are shapes, or zeros."""
    fields = {
        "hidden_act": "silu", "max_position_embeddings": 8192, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": None,
    } | MODELS[name]  # fmt: skip
    config = DecoderConfig.from_huggingface(fields, dtype=dtype)
    state = nnx.state(abstract(config))
    if zeros:
        state = filled(state)
    return Pretrained(
        name=name, origin="shapes", config=config, huggingface_config=fields, state=state,
        tokenizer=byte_tokenizer(),
    )  # fmt: skip


def ppo(base: Pretrained, cfg: PPOConfig):
    """The update, its arguments as shapes, its static arguments."""

    def untrained(state):
        return build(dataclasses.replace(base, state=state), cfg.lora, seed=0)

    fixed = for_products_of(base.state, base)
    definition, trainable, frozen = split(untrained, fixed if cfg.lora else base.state)
    reward_def, reward_state = split(
        lambda state: nnx.split(
            nnx.merge(*reward_models.initial(dataclasses.replace(base, state=state), 0))
        ),
        evaluated(copied, base.state),
    )
    optimizer = ppo_training.ppo_optimizer(cfg)
    static = Static(
        definition, base.definition, (("reward", 1.0, reward_def),), optimizer, cfg, (0,)
    )
    rewards = {"reward": for_products_of(reward_state, base)}
    arguments = (
        state_of(trainable, optimizer), Frozen(frozen, fixed, rewards),
        *prompts(cfg.batch, cfg.prompt_tokens), responses(cfg.batch, cfg.response_tokens), {},
        array((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)),
    )  # fmt: skip
    return ppo_training.update, arguments, {"static": static}


def reward(base: Pretrained, cfg: RewardConfig):
    definition, trainable, frozen = split(
        lambda state: reward_models.initial(dataclasses.replace(base, state=state), 0, cfg.lora),
        base.state,
    )
    optimizer = optax.adamw(1e-5)
    rows = [array((cfg.batch_rows, cfg.max_tokens))] * 4
    index = [array((2 * cfg.batch_pairs,))] * 2 + [array((cfg.batch_pairs,))] * 2
    batch = PairBatch(*rows, *index, array((cfg.batch_pairs,), jnp.float32))
    static = {"definition": definition, "optimizer": optimizer, "cfg": cfg}
    return reward_training.update, (state_of(trainable, optimizer), frozen, batch), static


def sampling(base: Pretrained, cfg: PPOConfig):
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cfg.batch))
    static = {
        "decoder_def": base.definition, "length": cfg.response_tokens, "end": 0, "pad": 0,
        "temperature": cfg.temperature,
    }  # fmt: skip
    return begun, (base.state, *prompts(cfg.batch, cfg.prompt_tokens), keys), static


def evaluation(base: Pretrained, cfg: EvaluationConfig, lengths: PPOConfig):
    arguments = (
        base.state, evaluated(copied, base.state), *prompts(cfg.batch, lengths.prompt_tokens),
        responses(cfg.batch, lengths.response_tokens), array((), jnp.float32),
    )  # fmt: skip
    definitions = base.definition, base.definition
    return sequence_kl, arguments, {
        "definitions": definitions, "forward_batch": lengths.forward_batch
    }  # fmt: skip


def for_products_of(state, base: Pretrained):
    """A frozen tree in the dtype of its products."""
    return evaluated(lambda state: for_products(state, base.config.products), state)


def split(make, *states) -> tuple[Any, ...]:
    """What `make` returns, a static half and trees of arrays."""
    static = []

    def arrays(*states):
        definition, *made = make(*states)
        static.append(definition)
        return made

    made = evaluated(arrays, *states)
    return static[0], *made


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def evaluated(function, *trees):
    """What a function makes of arrays, or the shapes that it makes of shapes."""
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trees))
    return jax.eval_shape(function, *trees) if shapes else function(*trees)


def filled(tree):
    """Zeros, and a key, in place of shapes; arrays stay."""

    def zeros(x):
        if isinstance(x, jax.Array):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), x.shape)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(zeros, tree)


def state_of(trainable, optimizer) -> TrainState:
    own = evaluated(copied, trainable)  # which an update consumes
    return TrainState(own, evaluated(optimizer.init, own), array(()))


def placed(tree, axes: PartitionSpec | None = None):
    """Shapes on the mesh: divided by the table of rules, or all by these axes."""

    def place(path, x):
        own = devices.kept_axes(path, x, RULES) if axes is None else axes
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices.mesh(), own))

    return jax.tree_util.tree_map_with_path(place, tree)


def array(shape: tuple[int, ...], dtype=np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def prompts(batch: int, time: int):
    return array((batch, time)), array((batch, time), bool)


def responses(batch: int, time: int) -> Responses:
    shape = batch, time
    return Responses(array(shape), array(shape, bool), array(shape, jnp.float32))
