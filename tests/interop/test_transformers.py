"""The decoder and the tokenizer against transformers in PyTorch, float32."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_jax import config
from rlhf_jax.language_model import sampling
from rlhf_jax.language_model.attention import block_mask
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.pretrained import gguf_files, hub, tensor_names
from rlhf_jax.pretrained.tokenizer import Tokenizer

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch", reason="PyTorch is the extra `interop`")

SMALL = {
    "vocab_size": 101, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 5000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama with one key head, untied": {
        "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "llama 3.1": {
        "architectures": ["LlamaForCausalLM"], "head_dim": 16,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama stretched, biased": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen2 with yarn": {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3 with yarn": {
        "architectures": ["Qwen3ForCausalLM"], "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    "mistral, in windows": {
        "architectures": ["MistralForCausalLM"], "sliding_window": 4, "tie_word_embeddings": False,
    },
    "qwen2 with windows in upper layers": {
        "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3 with windows by the list": {
        "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1], "head_dim": 6,
        "use_sliding_window": True, "sliding_window": 4,
    },
    "smollm3 by the interval": {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 2,
        "attention_bias": True, "rope_theta": None,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 11, "sliding_window": 4, "rope_local_base_freq": 300.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma3_text by the pattern": {
        "architectures": ["Gemma3ForCausalLM"], "sliding_window": 5, "sliding_window_pattern": 2,
        "rope_theta": None, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True,
    },
    "gemma3_text as transformers 5 writes it": {
        "architectures": ["Gemma3ForCausalLM"], "sliding_window": 4, "query_pre_attn_scalar": 6,
        "rope_theta": None, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}  # fmt: skip


def written(folder, state, decoder, config):
    """The model's own export, for transformers to read."""
    save_file(tensor_names.huggingface_tensors(state, decoder), folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return theirs.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """(our definition, our state, their model) of a random decoder, nothing in it zero or one."""
    own = {"model_type": request.param.split()[0].rstrip(",")} | FAMILIES[request.param]
    left_out = {name for name, value in FAMILIES[request.param].items() if value is None}
    config = {name: value for name, value in (SMALL | own).items() if name not in left_out}
    decoder = DecoderConfig.from_huggingface(config)
    state = nnx.state(Decoder(decoder, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state)
    theirs = written(tmp_path_factory.mktemp("model"), state, decoder, config)
    return nnx.split(tensor_names.abstract(decoder))[0], state, theirs


def rows(side, lengths=(12, 5, 9), width=12, vocab=101):
    rng = np.random.default_rng(1)
    tokens, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if side == "left" else slice(length)
        tokens[row, span], mask[row, span] = rng.integers(3, vocab, length), True
    return tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def our_logits(definition, state, tokens, mask):
    documents = jnp.where(mask, 0, -1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    decoder = nnx.merge(definition, state)
    visible = block_mask(documents, jnp.zeros_like(documents))
    return decoder.logits(decoder(tokens, positions, visible))


def their_logits(model, tokens, mask):
    mask = torch.tensor(mask)
    with torch.no_grad():
        return model(
            torch.tensor(tokens).long(), attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        ).logits.numpy()  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_differ_by_at_most_1e_4_through_padding(both, side):
    definition, state, theirs = both
    tokens, mask = rows(side)
    ours = np.asarray(our_logits(definition, state, jnp.asarray(tokens), jnp.asarray(mask)))
    expected = their_logits(theirs, tokens, mask)
    assert np.abs(expected[mask]).max() > 1
    assert np.abs(ours - expected)[mask].max() <= 1e-4


def sampled(definition, state, tokens, mask, *, temperature, length):
    return sampling.sample(
        state, jnp.asarray(tokens), jnp.asarray(mask),
        jax.random.split(jax.random.key(0), len(tokens)), temperature,
        decoder_def=definition, length=length, end=2, pad=0,
    )  # fmt: skip


def test_decoding_with_our_cache_samples_from_their_logits(both):
    definition, state, theirs = both
    tokens, mask = rows("left")
    responses = sampled(definition, state, tokens, mask, temperature=1.0, length=8)
    whole = np.concatenate([tokens, responses.tokens], axis=1)
    whole_mask = np.concatenate([mask, responses.mask], axis=1)
    logits = torch.tensor(their_logits(theirs, whole, whole_mask)[:, 11:-1])
    logs = logits.log_softmax(-1).numpy()
    expected = np.take_along_axis(logs, np.asarray(responses.tokens)[..., None], -1)[..., 0]
    assert np.abs(expected - responses.logprobs)[np.asarray(responses.mask)].max() <= 1e-4


def test_greedy_responses_are_those_that_transformers_generates(both):
    definition, state, theirs = both
    tokens, mask = rows("left")
    ours = sampled(definition, state, tokens, mask, temperature=0.0, length=10)
    generated = theirs.generate(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), do_sample=False,
        max_new_tokens=10, eos_token_id=2, pad_token_id=0,
    ).numpy()[:, tokens.shape[1] :]  # fmt: skip
    np.testing.assert_array_equal(ours.tokens[:, : generated.shape[1]], generated)
    assert len(np.unique(generated)) > 2


@pytest.fixture(scope="module")
def packaged():
    path = hub.packaged_gguf()
    if path is None:
        pytest.skip(f"the package {hub.PACKAGE} is not installed")
    return gguf_files.load_gguf(path, name=config.SMOLLM2)


TEXTS = [
    "The capital of France is", "def add(a, b):\n    return a + b\n\n\nprint(add(2, 40))",
    "Naïve façade — “quotes”, 東京 и Москва, 🙂👩‍👩‍👧", "  leading, trailing  and\ttabs \n\n ",
    "1234567890 3.14159 12/31/2024", "", "don't can't I'll we've", "<|im_start|> is plain text",
    "a" * 200, "\x00\x7f\u200b\u2028", "http://example.org/?q=a%20b&c=d#e",
]  # fmt: skip


def test_logits_of_the_real_weights_differ_by_at_most_1e_3(packaged, tmp_path):
    theirs = written(tmp_path, packaged.state, packaged.config, dict(packaged.huggingface_config))
    encoded = packaged.tokenizer.encode(TEXTS[:2])
    width = max(map(len, encoded))
    tokens, mask = np.zeros((2, width), np.int32), np.zeros((2, width), bool)
    for row, text in enumerate(encoded):
        tokens[row, width - len(text) :], mask[row, width - len(text) :] = text, True
    ours = our_logits(packaged.definition, packaged.state, jnp.asarray(tokens), jnp.asarray(mask))
    assert np.abs(np.asarray(ours) - their_logits(theirs, tokens, mask))[mask].max() <= 1e-3


@pytest.mark.slow
def test_our_reading_of_the_gguf_tokenizer_is_theirs(packaged):
    """transformers takes most of a minute to read it, which is why the library does not ask it."""
    path = hub.packaged_gguf()
    huggingface = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = Tokenizer.of(huggingface)
    for text in TEXTS:
        assert packaged.tokenizer.encode([text]) == theirs.encode([text]), repr(text)
        (tokens,) = theirs.encode([text])
        assert packaged.tokenizer.decode_exact(tokens) == theirs.decode_exact(tokens)
    assert (packaged.tokenizer.prefix, packaged.tokenizer.suffix, packaged.tokenizer.end) == (
        theirs.prefix, theirs.suffix, theirs.end,
    )  # fmt: skip
