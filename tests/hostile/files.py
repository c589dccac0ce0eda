"""Malformed files, made from a seed: for every reader some hundred kinds and damages."""

import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_jax.pretrained.model import random_model

PAIR = {
    "post_id": "p", "domain": "d", "history": "why?", "human_ref_A": "a", "human_ref_B": "b",
    "score_A": 3, "score_B": 1, "labels": 1,
}  # fmt: skip
MESSAGE = {
    "message_id": "m", "message_tree_id": "t", "text": "why?", "role": "prompter", "lang": "en",
    "deleted": False,
}  # fmt: skip
VALUES = [
    None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", " ", "x" * 10**6,
    "\ud800", "\x00", "7" * 5000, [], [1, [2]], {}, {"a": {"b": []}}, ["x"] * 1000, "2024-01-01",
]  # fmt: skip
KINDS = ("preferences", "prompts", "images", "model", "gguf", "run")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file that was cut, flipped, doubled, filled, encoded otherwise or replaced."""
    at = rng.randrange(max(len(content), 1))
    return rng.choice([
        lambda: content[:at],
        lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + bytes(rng.randrange(1, 5000)) + content[at:],
        lambda: content + content[at:],
        lambda: rng.randbytes(rng.randrange(3000)),
        lambda: b"",
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"<!DOCTYPE html><html>not found</html>",
        lambda: b"[" * 10**5,
        lambda: b'{"a": ' * 10**4 + b"1" + b"}" * 10**4,
    ])()  # fmt: skip


def special_file(path: Path, rng: random.Random) -> None:
    """Something that is no regular file, or one without end, in the place of a file."""
    path.unlink(missing_ok=True)
    rng.choice([
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("nothing"),
        lambda: path.mkdir(),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**42),
    ])()  # fmt: skip


def rows(row: dict, rng: random.Random) -> list[dict]:
    """A few rows, one of which has a value, a field or a name that it should not have."""
    made = [row | {"post_id": f"p{i}", "message_id": f"m{i}"} for i in range(5)]
    wrong = made[rng.randrange(5)]
    name = rng.choice([*row])
    change = rng.randrange(4)
    if change == 0:
        wrong.pop(name)
    elif change == 1:
        wrong[rng.choice(VALUES[15:17] and ["\ud800", "x" * 10**5, "", name.upper()])] = 1
    else:
        wrong[name] = rng.choice(VALUES)
    return made


def table(path: Path, row: dict, rng: random.Random) -> None:
    """A file of rows in one of the formats that are read, with rows or bytes that are wrong."""
    made = rows(row, rng)
    lines = "".join(json.dumps(one) + "\n" for one in made).encode()
    kind = rng.choice(["jsonl", "jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "json", "bomb"])
    path = path / f"rows.{kind}"
    if kind == "bomb":
        path = path.with_suffix(".jsonl.gz")
        filling = rng.choice([b"\n", b"x", b"[" * 99 + b"\n", b"{}\n", b'{"a": 1}\n'])
        path.write_bytes(gzip.compress(filling * (2**28 // len(filling)), 1))
        return
    if kind in ("parquet", "csv", "csv.gz"):
        plain = [{k: v for k, v in one.items() if isinstance(v, str | int | float) and k.isascii()
                  and str(v).isascii() and (not isinstance(v, int) or abs(v) < 2**63)}
                 for one in made]  # fmt: skip
        frame = pd.DataFrame(plain)
        content = io.BytesIO()
        try:
            frame.to_parquet(content) if kind == "parquet" else frame.to_csv(content, index=False)
        except (ValueError, TypeError, OverflowError):  # of mixed columns
            frame.astype(str).to_csv(content, index=False)
        content = content.getvalue()
    else:
        content = lines
    if rng.random() < 0.5:
        content = damaged(content, rng)
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    if rng.random() < 0.1:
        special_file(path, rng)


def images(folder: Path, rng: random.Random) -> None:
    """A MedMNIST file that is not one."""
    count = rng.choice([0, 1, 20, 40])
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((count, 28, 28, 3), np.uint8)
        arrays[f"{split}_labels"] = np.zeros((count, 1), np.uint8)
    name = rng.choice([*arrays])
    arrays[name] = rng.choice([
        lambda: np.uint8(1), lambda: np.zeros(7), lambda: np.array([None]),
        lambda: np.full(arrays[name].shape, 255, np.uint8), lambda: np.zeros((0, 0), np.uint8),
        lambda: np.zeros(3, "V8"), lambda: np.array(["x"]), lambda: arrays[name],
        lambda: np.zeros(2, [("a", "u1")]),
    ])()  # fmt: skip
    path = folder / "dermamnist.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if key == name and rng.random() < 0.6:
                content = rng.choice([
                    lambda c=content: damaged(c, rng),
                    lambda c=content: c.replace(b", 28, 28", b", 28, 9999999999"),
                    lambda c=content: c.replace(b"'shape': (", b"'shape': (" + b"(" * 4000),
                    lambda c=content: c[:8] + b"\xff\xff" + c[10:],
                    lambda c=content: c.replace(b"|u1", b"|O8"),
                ])()  # fmt: skip
            method = rng.choice([0, 8, 8, 12, 14])
            archive.writestr(f"{key}{rng.choice(['.npy'] * 9 + ['', '.NPY'])}", content, method)
        if rng.random() < 0.05:
            archive.writestr("bomb.npy", bytes(2**28), zipfile.ZIP_DEFLATED)
    if rng.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.1:
        special_file(path, rng)


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
    from safetensors.numpy import save_file

    from rlhf_jax.pretrained.tensor_names import huggingface_tensors

    whole = random_model()
    config = dict(whole.huggingface_config)
    tensors = huggingface_tensors(whole.state, whole.config)
    whole.tokenizer.huggingface.save_pretrained(folder)
    change = rng.randrange(5)
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
    elif change >= 3:
        path = rng.choice(files)
        path.write_bytes(damaged(path.read_bytes(), rng))
        if rng.random() < 0.2:
            special_file(path, rng)


def gguf_file(folder: Path, rng: random.Random) -> None:
    """A GGUF file with one field, tensor or byte that is wrong."""
    import gguf

    from rlhf_jax.pretrained.tensor_names import huggingface_tensors, tensor_table

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


def run(folder: Path, rng: random.Random) -> None:
    """The files of a run, one of them damaged."""
    record = {"stage": "reward", "identity": "0" * 16, "config": {}, "inputs": {}, "about": {}}
    row = {"step": 1, "loss": 0.5, "text": "läng"}
    contents = {
        "config.json": json.dumps(record).encode(),
        "summary.json": json.dumps({"identity": "0" * 16, "loss": 1}).encode(),
        "metrics.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for _ in "12").encode(),
    }
    name = rng.choice([*contents])
    contents[name] = rng.choice(
        [lambda: damaged(contents[name], rng), lambda: json.dumps(rng.choice(VALUES)).encode()]
    )()
    for own, content in contents.items():
        (folder / own).write_bytes(content)


def make(kind: str, folder: Path, seed: int) -> None:
    """Writes the file or files of one kind and number."""
    rng = random.Random(f"{kind} {seed}")
    folder.mkdir(parents=True)
    if kind in ("preferences", "prompts"):
        own = folder / {"preferences": "shp", "prompts": "oasst"}[kind]
        own.mkdir()
        table(own, PAIR if kind == "preferences" else MESSAGE, rng)
    elif kind == "images":
        (folder / "medmnist").mkdir()
        images(folder / "medmnist", rng)
    else:
        {"model": model, "gguf": gguf_file, "run": run}[kind](folder, rng)


def read(kind: str, folder: Path) -> None:
    """Hands what was written to its reader."""
    if kind == "preferences":
        from rlhf_jax.data.preferences import load_preferences, posts

        posts(load_preferences(folder)[0], max_pairs_per_post=None, seed=0)
    elif kind == "prompts":
        from rlhf_jax.data.prompts import load_prompts

        load_prompts(folder)
    elif kind == "images":
        from gan_jax import data

        data.load("dermamnist", side=28, data_dir=folder, student_id=None)
    elif kind in ("model", "gguf"):
        from rlhf_jax.pretrained import hub, loading

        path = hub.find(str(folder / "model.gguf" if kind == "gguf" else folder))
        hub.identity(path, dtype="float32")
        loading.load(path, name="hostile")
    else:
        from experiment_runs.inventory import description
        from experiment_runs.run import Run

        found = Run(folder)
        _ = found.finished, found.metrics(), description(found)
        found.rewind(1)
        found.require_finished()


def numbers(count: int, seed: int) -> Iterator[tuple[str, int]]:
    """(kind, seed) of so many files, kinds in turn."""
    for i in range(count):
        yield KINDS[i % len(KINDS)], seed * 10**6 + i
