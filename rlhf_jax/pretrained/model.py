"""A decoder with its weights and tokenizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from experiment_runs import devices
from experiment_runs.files import fingerprint
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.pretrained.tensor_names import abstract
from rlhf_jax.pretrained.tokenizer import Tokenizer, byte_tokenizer


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A decoder with its weights and tokenizer."""

    name: str
    origin: str  # where it was read from
    config: DecoderConfig
    huggingface_config: Mapping[str, Any]  # for exports
    state: nnx.State
    tokenizer: Tokenizer

    @property
    def definition(self) -> nnx.GraphDef:
        return nnx.split(abstract(self.config))[0]


def random_model(dtype: str = "float32", *, seed: int = 0) -> Pretrained:
    """Two small layers with random weights on a byte tokenizer: the model of `tiny` and tests."""
    tokenizer = byte_tokenizer()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 1024, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "eos_token_id": tokenizer.end, "bos_token_id": None,
    }  # fmt: skip
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    state = nnx.state(Decoder(decoder, rngs=nnx.Rngs(seed)))
    return Pretrained(
        name="random",
        origin="random weights",
        config=decoder,
        huggingface_config=config,
        state=state,
        tokenizer=tokenizer,
    )


def model_fingerprint(model: Pretrained) -> str:
    """Of weights, configuration and tokenizer, wherever they come from."""
    leaves = [devices.on_host(leaf) for leaf in jax.tree.leaves(model.state)]
    config = dataclasses.asdict(model.config) | {"dtype": str(model.config.dtype)}
    return fingerprint(config, tokenizer_fingerprint(model), *leaves)


def tokenizer_fingerprint(model: Pretrained) -> str:
    tokenizer = model.tokenizer
    parts = tokenizer.prefix, tokenizer.suffix, tokenizer.closing, tokenizer.ends
    return fingerprint(parts, tokenizer.huggingface.backend_tokenizer.to_str())
