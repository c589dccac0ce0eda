"""Exports as the last transformers of version 4 reads them, in an environment of its own."""

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax.config import PPOConfig
from rlhf_jax.export import huggingface
from rlhf_jax.language_model import logprobs
from rlhf_jax.pretrained.model import random_model

PYTHON = Path(__file__).resolve().parents[2] / ".venv-transformers4" / "bin" / "python"
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON.exists(), reason="make .venv-transformers4/done makes it"),
]
SCRIPT = """
import json, sys, torch, transformers
path, question = sys.argv[1:]
assert transformers.__version__.startswith("4.")
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
assert not any(info.values()), info
messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, -1].tolist()
print(json.dumps([ids, logits, tokenizer.pad_token_id, model.generation_config.eos_token_id]))
"""


def test_policy_loads_with_the_same_tokens_and_logits(tmp_path):
    model = random_model()
    decoder = nnx.merge(model.definition, model.state)
    settings = huggingface.generation_settings(PPOConfig())
    huggingface.export_policy(decoder, model, tmp_path, settings)
    question = "naïve  text\n\tand 123 <b>"
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, tmp_path, question], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids, logits, pad, end = json.loads(done.stdout.splitlines()[-1])
    tokenizer = model.tokenizer
    assert ids == [*tokenizer.prefix, *tokenizer.encode([question])[0], *tokenizer.suffix]
    assert (pad, end) == (tokenizer.pad, tokenizer.end)
    row = jnp.asarray([[*ids, 0]])
    states = logprobs.response_states(decoder, row, jnp.ones_like(row, bool), len(ids))
    np.testing.assert_allclose(decoder.logits(states)[0, 0], logits, atol=1e-4)
