"""GGUF files, written with the gguf library, beside the same weights from safetensors."""

import json
import os
import struct

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from experiment_runs.errors import UserError
from rlhf_jax.language_model.config_fields import FAMILIES
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.pretrained import gguf_files, gguf_tokenizer, hub
from rlhf_jax.pretrained.loading import load
from rlhf_jax.pretrained.model import random_model
from rlhf_jax.pretrained.tensor_names import huggingface_tensors, tensor_table

Q = gguf.GGMLQuantizationType
ARCHITECTURES = {name: family for name, (family, _) in gguf_files.ARCHITECTURES.items()}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "sliding_window": 3,
    "rope_local_base_freq": 1e4, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def interleaved(rows, heads):
    """As llama.cpp's converter lays the rows of queries and keys out."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def written(path, architecture, config, tensors, kind, blocks=(), **changes):
    """A GGUF file of a model, its matrices in numbers of a kind; fields may be changed.

    Of tensors that are named in `blocks` the bytes are given, with the kind of their numbers.
    """
    table = {hf: theirs for _, hf, theirs in tensor_table(DecoderConfig.from_huggingface(config))}
    tokenizer = random_model().tokenizer.huggingface
    tokens = tokenizer.convert_ids_to_tokens(range(config["vocab_size"]))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([True, False])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for field, value in changes.items():
        getattr(writer, f"add_{field}")(*value)
    replaced = changes.get("tensor", [None])[0]
    for name, values in tensors.items():
        if table.get(name, name) == replaced:
            continue
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, heads if "q_proj" in name else kv_heads)
        if architecture == "gemma3" and "norm" in name:
            values = values + 1
        own = dict(blocks).get(name, kind if values.ndim == 2 else Q.F32)
        data = values if name in blocks else gguf.quantize(values, own)
        writer.add_tensor(table.get(name, name), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(architecture, **sizes):
    """A configuration of an architecture, and tensors for it."""
    family = ARCHITECTURES[architecture]
    config = dict(random_model().huggingface_config) | {"model_type": family, **sizes}
    architectures = [FAMILIES[family].architecture + "ForCausalLM"]
    config |= {"architectures": architectures, "rms_norm_eps": 2.0**-17}  # exact in float32
    config |= (
        GEMMA if architecture == "gemma3" else {"tie_word_embeddings": architecture != "qwen3"}
    )
    decoder = DecoderConfig.from_huggingface(config)
    rng = np.random.default_rng(0)
    state = nnx.state(Decoder(decoder, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state)
    return config, huggingface_tensors(state, decoder)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", Q.Q8_0), ("llama", Q.F16), ("qwen2", Q.Q5_1), ("qwen3", Q.Q4_0), ("gemma3", Q.Q8_0),
     ("gemma3", Q.BF16), ("smollm3", Q.Q4_1)],
    ids=lambda part: getattr(part, "name", part),
)  # fmt: skip
def test_a_gguf_file_is_the_model_whose_weights_it_has(architecture, kind, tmp_path):
    config, tensors = random_tensors(architecture)
    path = written(tmp_path / "model.gguf", architecture, config, tensors, kind)
    assert hub.find(str(path)) == path  # a model may be named by its file
    ours = load(path, name="x")
    rounded = {
        name: gguf.dequantize(gguf.quantize(values, kind), kind) if values.ndim == 2 else values
        for name, values in tensors.items()
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({name: np.array(values) for name, values in rounded.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random_model().tokenizer.huggingface.save_pretrained(folder)
    theirs = load(folder, name="x")
    assert ours.config == theirs.config
    assert ours.tokenizer.encode(["naïve 42"]) == theirs.tokenizer.encode(["naïve 42"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours.state, theirs.state)


def bits(byte, place, count):
    return byte >> place & (1 << count) - 1


def scale_and_least(packed, i):
    """The six-bit numbers of a part of 32, of eight pairs in twelve bytes (Q4_K, Q5_K)."""
    if i < 4:
        return bits(packed[i], 0, 6), bits(packed[4 + i], 0, 6)
    high = packed[i - 4] >> 6, packed[i] >> 6
    return high[0] << 4 | bits(packed[4 + i], 0, 4), high[1] << 4 | packed[4 + i] >> 4


def number(kind, block, i):
    """One of the 256 numbers of a block, as llama.cpp's ggml-quants.c lays them out."""

    def half(at):
        return float(np.frombuffer(block[at : at + 2], np.float16)[0])

    hundred, part, place = i // 128, i % 128 // 32, i % 32  # of 128, of 32 in it, in that
    sixteen, thirty_two = i // 16, i // 32
    if kind == Q.Q2_K:  # 16 bytes of scales, 64 of numbers, two halves
        scale, value = block[sixteen], bits(block[16 + 32 * hundred + place], 2 * part, 2)
        return half(80) * bits(scale, 0, 4) * value - half(82) * (scale >> 4)
    if kind == Q.Q3_K:  # 32 bytes of high bits, 64 of low ones, 12 of scales, a half
        high = bits(block[place], thirty_two, 1)
        value = bits(block[32 + 32 * hundred + place], 2 * part, 2) + 4 * high - 4
        low = bits(block[96 + sixteen % 8], 4 * (sixteen // 8), 4)
        scale = low + 16 * bits(block[104 + sixteen % 4], 2 * (sixteen // 4), 2) - 32
        return half(108) * scale * value
    if kind == Q.Q6_K:  # 128 bytes of low bits, 64 of high ones, 16 of signed scales, a half
        low = bits(block[64 * hundred + 32 * (part % 2) + place], 4 * (part // 2), 4)
        value = low + 16 * bits(block[128 + 32 * hundred + place], 2 * part, 2) - 32
        return half(208) * int(np.int8(np.uint8(block[192 + sixteen]))) * value
    scale, least = scale_and_least(block[4:16], thirty_two)  # two halves, then these
    start = 16 if kind == Q.Q4_K else 48  # 32 bytes of fifth bits between them
    value = bits(block[start + 32 * (thirty_two // 2) + place], 4 * (thirty_two % 2), 4)
    if kind == Q.Q5_K:
        value += 16 * bits(block[16 + place], thirty_two, 1)
    return half(0) * scale * value - half(2) * least


HALVES = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}


def random_blocks(kind, rows, rng):
    """Bytes of rows of one block, and the numbers that they stand for."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (rows, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = rng.uniform(1e-4, 1e-3, rows).astype(np.float16)
        blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    read = [[number(kind, row.tobytes(), i) for i in range(256)] for row in blocks]
    return blocks, np.array(read, np.float32)


def test_blocks_of_256_numbers_are_read_as_llama_cpp_lays_them_out(tmp_path):
    """As in files called Q4_K_M, whose tensors are of several kinds."""
    sizes = {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1}
    config, tensors = random_tensors("llama", **sizes)
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    names = [f"model.layers.0.{part}_proj.weight" for part in parts]
    kinds = dict(zip(names, (Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q2_K, Q.Q3_K), strict=True))
    rng, expected = np.random.default_rng(0), {}
    for name, kind in kinds.items():
        tensors[name], expected[name] = random_blocks(kind, len(tensors[name]), rng)
    path = written(tmp_path / "m-Q4_K_M.gguf", "llama", config, tensors, Q.F16, blocks=kinds)
    model = load(path, name="x")
    found = huggingface_tensors(model.state, model.config)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expert_count": (4,)}, "expert_count=4"),
        ({"rope_dimension_count": (4,)}, "rope.dimension_count=4 beside heads of 8"),
        ({"final_logit_softcapping": (30.0,)}, "final_logit_softcapping=30"),
        ({"rope_scaling_type": (gguf.RopeScalingType.LONGROPE,), "rope_scaling_factor": (2.0,)},
         "rope_type 'longrope' is not supported"),
        ({"rope_scaling_type": (gguf.RopeScalingType.LONGROPE,)}, "'longrope' is not supported"),
        ({"rope_scaling_yarn_attn_factor": (1.5,)}, "rope.scaling.yarn_attn_factor=1.5"),
        ({"rope_scaling_yarn_log_mul": (0.1,)}, "rope.scaling.yarn_log_multiplier=0.1"),
        ({"rope_dimension_sections": ([1, 1, 2],)}, r"rope.dimension_sections=\[1, 1, 2\]"),
        ({"sliding_window": (512,)}, "attention.sliding_window=512"),
        ({"causal_attention": (False,)}, "attention.causal=False"),
        ({"pooling_type": (gguf.PoolingType.MEAN,)}, "pooling_type=1"),
        ({"uint16": ("split.count", 2)}, "split.count=2: .*llama-gguf-split --merge"),
        ({"string": ("general.type", "adapter")}, "general.type='adapter', not a model"),
        ({"tokenizer_pre": ("deepseek-llm",)}, "tokenizer.ggml.pre='deepseek-llm'"),
        ({"tokenizer_model": ("t5",)}, "tokenizer.ggml.model='t5'"),
        ({"tensor": ("rope_freqs.weight", np.full(4, 1.5, np.float32))}, "not that of Llama 3.1"),
        ({"tensor": ("blk.0.odd.weight", np.ones(4, np.float32))}, "odd.weight is not part"),
        ({"tensor": ("output_norm.weight", np.ones(32, np.int8))}, "output_norm.weight is I8"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_says_beside_is_refused_by_name(changes, named, tmp_path):
    config, tensors = random_tensors("llama")
    path = tmp_path / "model.gguf"
    written(path, "llama", config, tensors, Q.F16, **changes)
    with pytest.raises(UserError, match=named):
        load(path, name="x")


def test_fields_that_say_what_is_computed_anyway_are_read(tmp_path):
    config, tensors = random_tensors("llama")
    said = {
        "causal_attention": (True,), "expert_count": (0,), "logit_scale": (1.0,),
        "rope_scaling_finetuned": (False,), "vocab_size": (260,), "value_length": (8,),
    }  # fmt: skip
    path = written(tmp_path / "m.gguf", "llama", config, tensors, Q.F16, **said)
    assert load(path, name="x").config == DecoderConfig.from_huggingface(config)


def test_yarn_is_read_with_all_that_its_file_says(tmp_path):
    config, tensors = random_tensors("llama")
    own = {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0}
    changes = {
        "rope_scaling_type": (gguf.RopeScalingType.YARN,), "rope_scaling_factor": (4.0,),
        "rope_scaling_orig_ctx_len": (512,), "rope_scaling_yarn_beta_fast": (16.0,),
    }  # fmt: skip
    path = written(tmp_path / "m.gguf", "llama", config, tensors, Q.F16, **changes)
    scaled = config | {"rope_scaling": {"rope_type": "yarn", **own}}
    assert load(path, name="x").config == DecoderConfig.from_huggingface(scaled)


def test_the_stretched_rope_of_llama_3_is_known_by_its_factors(tmp_path):
    config, tensors = random_tensors("llama")
    config |= {"rope_theta": 5e5}
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 8, 2) / 8)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 32 + smooth)
    tensor = ("rope_freqs.weight", factors.astype(np.float32))
    path = written(tmp_path / "m.gguf", "llama", config, tensors, Q.F16, tensor=tensor)
    scaling = dict(load(path, name="x").config.rope_scaling)
    assert (scaling["kind"], scaling["factor"]) == ("llama3", 32.0)


def empty(path, architecture):
    """A file with a header and nothing in it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_an_architecture_that_is_not_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="architecture 'mamba'; use one of llama, qwen2"):
        load(empty(tmp_path / "model.gguf", "mamba"), name="x")


@pytest.mark.parametrize("kind", [4, 8, 9, 12])
def test_a_gguf_header_that_promises_more_than_the_file_has_is_refused(tmp_path, kind):
    path = empty(tmp_path / "model.gguf", "llama")
    content = path.read_bytes()
    name = b"general.endless"
    field = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, kind, 2**40)
    count = struct.unpack("<Q", content[16:24])[0]
    path.write_bytes(content[:16] + struct.pack("<Q", count + 1) + content[24:] + field)
    with pytest.raises(UserError, match=r"model\.gguf: cannot be read as a model .*ends within"):
        load(path, name="x")


def test_a_large_file_with_a_hole_behind_its_tensors_is_refused_before_its_bytes_are_taken(
    tmp_path,
):
    path = empty(tmp_path / "model.gguf", "llama")
    os.truncate(path, 2**36)
    with pytest.raises(UserError, match=r"model\.gguf: 68,719,476,736 bytes, its header says"):
        hub.identity(path, dtype="float32")


TEXTS = [
    "The quick brown fox don't jump 1234567 times,  twice\n\n  over it.\n", "naïve façade: 東京 🙂",
    "   three spaces", "x\ty\r\nz", "", "I'LL we've", "2024-12-31", "...!?", "a" * 40,
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(model):
    """Tokens, their kinds and merges, of a small tokenizer of either kind."""
    backend = Backend(BPE(unk_token="<unk>", byte_fallback=model == "llama"))
    alphabet = []
    if model == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Replace(" ", gguf_tokenizer.SPACE)
    start = SPECIAL if model == "gpt2" else SPECIAL + BYTES
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=start, initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for text in TEXTS if "東" not in text]
    backend.train_from_iterator(3 * texts, trainer)
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    kinds = [3 if token in SPECIAL else 6 if token in BYTES else 1 for token in tokens]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return tokens, kinds, [" ".join(merge) for merge in merges]


@pytest.mark.parametrize(
    ("architecture", "model", "split"),
    [("llama", "gpt2", "llama-bpe"), ("qwen2", "gpt2", "qwen2"), ("gemma3", "llama", "default"),
     ("llama", "llama", "default")],
)  # fmt: skip
def test_the_tokenizer_of_a_gguf_file_is_the_one_that_transformers_makes_of_it(
    architecture, model, split
):
    reference = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tokens, kinds, merges = trained(model)
    scores = [-float(i) for i in range(len(tokens))]
    fields = {
        "general.architecture": architecture, "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": split, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.scores": scores,
    }  # fmt: skip
    own = {"tokenizer_type": model, "pre_tokenizer_type": split, "tokens": list(tokens),
           "token_type": kinds, "scores": scores}  # fmt: skip
    if model == "gpt2":
        fields["tokenizer.ggml.merges"] = own["merges"] = merges
    theirs, _ = reference.convert_gguf_tokenizer(architecture, own)
    ours = gguf_tokenizer.gguf_tokenizer(fields, "x").backend_tokenizer
    # transformers adds no word mark before spaces, llama.cpp and tokenizer.json files do
    texts = TEXTS[:2] + TEXTS[3:] if (architecture, model) == ("llama", "llama") else TEXTS
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == text
    long = ours.encode(TEXTS[0], add_special_tokens=False).ids
    assert len(long) < 0.7 * len(TEXTS[0])  # merges are there


def test_single_digits_and_composed_letters_are_read_as_the_model_does():
    tokens, kinds, merges = trained("gpt2")
    fields = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.merges": merges,
    }  # fmt: skip

    def read(split, text):
        whole = gguf_tokenizer.gguf_tokenizer(fields | {"tokenizer.ggml.pre": split}, "x")
        return whole.backend_tokenizer.encode(text).tokens

    assert read("smollm", "1234567") == read("qwen2", "1234567") == [*"1234567"]
    assert len(read("gpt-2", "1234567")) < 7
    assert read("llama-bpe", "1234567")[-1] == "7"
    assert read("qwen2", "e\u0301") == read("qwen2", "\u00e9") != read("gpt-2", "e\u0301")
