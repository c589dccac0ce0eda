"""Exports as the last transformers of version 4 reads them, in an environment of its own."""

import copy
import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax.config import PPOConfig
from rlhf_jax.export import huggingface
from rlhf_jax.language_model import logprobs
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model import model as reward_models

PYTHON = Path(__file__).resolve().parents[2] / ".venv-transformers4" / "bin" / "python"
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-transformers4/done makes it"),
]
QUESTION = "naïve  text\n\tand 123 <b>"
SCRIPT = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.")
results = {}
for path in sys.argv[2:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": sys.argv[1]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    scorer = path.endswith("reward")
    kind = "AutoModelForSequenceClassification" if scorer else "AutoModelForCausalLM"
    load = getattr(transformers, kind).from_pretrained
    model, info = load(path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0]
    found = logits[0] - model.config.reward_offset if scorer else logits[-1]
    ends = model.config.eos_token_id if scorer else model.generation_config.eos_token_id
    results[path] = [ids, found.tolist(), tokenizer.pad_token_id, ends]
print(json.dumps(results))
"""
FAMILIES = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 5, "tie_word_embeddings": False},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [0, 1]},
    "gemma3_text": {
        "sliding_window": 5, "query_pre_attn_scalar": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 9e4, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    },
}  # fmt: skip


def model_of(family):
    """A small model whose parameters are neither zero nor one; responses end in two ways."""
    base = random_model()
    tokenizer = copy.deepcopy(base.tokenizer.huggingface)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|role|>", "<|stop|>"]})
    tokenizer = Tokenizer.of(tokenizer, ends=[tokenizer.convert_tokens_to_ids("<|stop|>")])
    config = dict(base.huggingface_config) | {"model_type": family, "attention_dropout": 0.0}
    config |= {"vocab_size": tokenizer.vocab_size} | FAMILIES[family]
    decoder = DecoderConfig.from_huggingface(config)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        nnx.state(Decoder(decoder, rngs=nnx.Rngs(0))),
    )
    return dataclasses.replace(
        base, config=decoder, huggingface_config=config, state=state, tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def read_there(tmp_path_factory):
    """Models and reward models by family, and what the older version reads of their exports."""
    folder, models = tmp_path_factory.mktemp("exports"), {}
    for family in FAMILIES:
        model = models[family] = model_of(family)
        decoder = nnx.merge(model.definition, model.state)
        settings = huggingface.generation_settings(PPOConfig())
        huggingface.export_policy(decoder, model, folder / f"{family}-policy", settings)
        rewarder = reward_models.RewardModel(decoder, rngs=nnx.Rngs(3))
        rewarder.offset[...], rewarder.gain[...] = jnp.float32(0.7), jnp.float32(2.5)
        judge = reward_models.FrozenRewardModel(*nnx.split(rewarder))
        huggingface.export_reward_model(judge, model, folder / f"{family}-reward")
    folders = sorted(folder.iterdir())
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, QUESTION, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return models, {path.name: found[str(path)] for path in folders}


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_with_the_same_tokens_and_numbers(read_there, family, kind):
    models, found = read_there
    model, (ids, numbers, pad, ends) = models[family], found[f"{family}-{kind}"]
    tokenizer = model.tokenizer
    assert ids == [*tokenizer.prefix, *tokenizer.encode([QUESTION])[0], *tokenizer.suffix]
    assert (pad, ends) == (tokenizer.pad, list(tokenizer.ends)) and len(ends) == 2
    decoder = nnx.merge(model.definition, model.state)
    if kind == "policy":
        row = jnp.asarray([[*ids, 0]])
        states = logprobs.response_states(decoder, row, jnp.ones_like(row, bool), len(ids))
        expected = decoder.logits(states)[0, 0]
    else:
        rewarder = reward_models.RewardModel(decoder, rngs=nnx.Rngs(3))
        rewarder.offset[...], rewarder.gain[...] = jnp.float32(0.7), jnp.float32(2.5)
        row = jnp.asarray([ids])
        (expected,) = rewarder(row, jnp.ones_like(row, bool))
    np.testing.assert_allclose(expected, numbers, atol=1e-4)
