"""Malformed models: folders as transformers writes them, reward models among them, and GGUF."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
from damage import VALUES, damaged, misplaced, special_file
from safetensors.numpy import save_file

from rlhf_jax.pretrained.model import Pretrained, random_model
from rlhf_jax.pretrained.tensor_names import huggingface_tensors, tensor_table

TEMPLATES = [
    "{{ raise_exception('no') }}", "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}", "{% set x = namespace(t='x') %}{% for i in range(99) %}"
    "{% set x.t = x.t + x.t %}{% endfor %}{{ x.t }}", "nothing", "", "{% if %}", "{{ 1 / 0 }}",
    "{{ messages[0].content.__class__.__mro__ }}", "{{ messages[9].content }}",
    "{{ messages[0]['content'] * 2 }}", "{{ messages[0]['content'] | upper }}",
    "{{ 'a' * 10 ** 9 }}", "{{ 9 ** (9 ** 9) }}", "{{ [[0] * 9999] * 10 ** 9 }}",
    "{{ (['a' * 10 ** 6] * 10 ** 6) | join }}", "{{ 'a' | center(2 ** 40) }}",
    "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}", "{{ '%9999999999s' % 'a' }}",
    "{% for i in range(9) %}" * 30 + "{% endfor %}" * 30, "{{ messages }}" * 10**5, "(" * 10**5,
    "{{ " + "(" * 10**4 + ")" * 10**4 + " }}", "{% set ns = namespace(x=3) %}{% for i in "
    "range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}", "{% include 'x' %}",
    "{{ messages[0]['content'][::-1] }}", "{{ range(10**12) | list }}", "\ud800".encode(
        "utf-8", "replace").decode(), "{{ lipsum(n=9999) }}", "{{ cycler.__init__.__globals__ }}",
]  # fmt: skip


def model(folder: Path, rng: random.Random) -> None:
    """A model folder with one file that is damaged, or one field or template that is wrong."""
    whole = random_model()
    config = dict(whole.huggingface_config)
    broken_folder(folder, whole, config, huggingface_tensors(whole.state, whole.config), rng)


def judge(folder: Path, rng: random.Random) -> None:
    """The same of a reward model that somebody else made."""
    whole = random_model()
    tensors = huggingface_tensors(whole.state, whole.config)
    tensors["score.weight"] = np.ones((1, whole.config.embed_dim), np.float32)
    config = whole.huggingface_config | {
        "architectures": ["LlamaForSequenceClassification"], "num_labels": 1,
        "pad_token_id": whole.tokenizer.pad, "reward_offset": 0.5,
    }  # fmt: skip
    broken_folder(folder, whole, config, tensors, rng)


def broken_folder(
    folder: Path, whole: Pretrained, config: dict, tensors: dict, rng: random.Random
) -> None:
    whole.tokenizer.huggingface.save_pretrained(folder)
    change = rng.randrange(6)
    if change == 0:
        wrong = [*VALUES, 10**6, -5, "32", 2**31, [32]]
        config[rng.choice([*config])] = rng.choice(wrong)
    elif change == 1:
        name = rng.choice([*tensors])
        tensors[name] = rng.choice([
            lambda: tensors[name] * np.float32("nan"), lambda: tensors[name][:1],
            lambda: tensors[name].astype(np.int8), lambda: np.zeros((0,), np.float32),
        ])()  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if change == 2:
        for path in files:
            if path.name in ("chat_template.jinja",):
                path.write_text(rng.choice(TEMPLATES))
    elif change == 3:
        path = folder / rng.choice(["tokenizer.json", "tokenizer_config.json"])
        path.write_text(json.dumps(misplaced(json.loads(path.read_text()), rng)))
    elif change >= 4:
        path = rng.choice(files)
        path.write_bytes(damaged(path.read_bytes(), rng))
        if rng.random() < 0.2:
            special_file(path, rng)


def gguf_file(folder: Path, rng: random.Random) -> None:
    """A GGUF file with one field, tensor or byte that is wrong."""
    whole = random_model()
    tokens = sorted(vocabulary := whole.tokenizer.huggingface.get_vocab(), key=vocabulary.get)
    special = set(whole.tokenizer.huggingface.all_special_tokens)
    tokens[-1] = "ab"  # what the only merge makes
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": whole.tokenizer.end,
        "tokenizer.chat_template": whole.tokenizer.huggingface.chat_template,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.block_count": 2,
        "llama.context_length": 1024, "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    names = {hf: short for _, hf, short in tensor_table(whole.config)}
    found = huggingface_tensors(whole.state, whole.config)
    tensors = {names[name]: values for name, values in found.items()}
    change, name = rng.randrange(4), rng.choice([*tensors])
    if change == 0:
        fields.pop(rng.choice([*fields]))
    elif change == 1:
        wrong = [2**31, 0, -1, "x", "", 1.5, float("nan"), [1, 2], ["a"], True, "x" * 10**6, 10**9]
        fields[rng.choice([*fields])] = rng.choice([*wrong, rng.choice(TEMPLATES)])
    elif change == 2:
        tensors[name] = rng.choice([
            lambda: tensors[name] * np.float32("nan"), lambda: tensors[name][:1],
            lambda: tensors[name].astype(np.int8), lambda: np.zeros((1, 1), np.float32),
        ])()  # fmt: skip
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, rng.choice(["llama"] * 9 + ["bert"]))
    kinds = {bool: "bool", int: "int32", float: "float32", str: "string", list: "array"}
    for key, value in fields.items():
        getattr(writer, f"add_{kinds[type(value)]}")(
            key, min(value, 2**31 - 1) if type(value) is int else value
        )
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if change == 3:
        content = path.read_bytes()
        at = rng.randrange(8, 3000)
        path.write_bytes(rng.choice([
            lambda: damaged(content, rng),
            lambda: content[:at] + b"\xff" * 8 + content[at + 8 :],
            lambda: content[:at] + bytes(8) + content[at + 8 :],
            lambda: content[: 8 * rng.randrange(1, 4)] + b"\xff" * 7 + b"\0" + content[32:],
            lambda: content[:at] + rng.randbytes(9) + content[at + 9 :],
        ])())  # fmt: skip
        if rng.random() < 0.1:
            special_file(path, rng)
