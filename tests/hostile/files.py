"""Malformed files of data and of results."""

import dataclasses
import gzip
import io
import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from damage import damaged, misplaced, special_file

from experiment_runs.assignment import PATH
from experiment_runs.run import Run, ensure
from rlhf_jax.ratings.store import response_hash

PAIR = {
    "post_id": "p", "domain": "d", "history": "why?", "human_ref_A": "a", "human_ref_B": "b",
    "score_A": 3, "score_B": 1, "labels": 1,
}  # fmt: skip
MESSAGE = {
    "message_id": "m", "message_tree_id": "t", "text": "why?", "role": "prompter", "lang": "en",
    "deleted": False,
}  # fmt: skip
DIALOGUE = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
LAYOUTS = [  # of preferences that users bring
    {"prompt": "why?", "chosen": "a", "rejected": "b"},
    {"chosen": DIALOGUE, "rejected": [*DIALOGUE[:1], {"role": "assistant", "content": "so"}]},
    {"conversation_a": DIALOGUE, "conversation_b": DIALOGUE, "winner": "model_a"},
    {"prompt": "why?", "response_0": "a", "response_1": "b", "better_response_id": 0},
    {"chosen": "\n\nHuman: why?\n\nAssistant: a", "rejected": "\n\nHuman: why?\n\nAssistant: b"},
]
RESPONSES = [{"prompt": "why?", "response": x, "model": "m", "prompt_id": 0} for x in "abc"]
RATING = {
    "response_hash": response_hash("why?", "a"), "rater": "Anna", "rater_kind": "person",
    "coherence": 4, "relevance": 5, "helpfulness": 3, "completeness": 3,
    "hallucination_toxicity": 5, "note": "", "time": "2026-05-04 10:30:00",
}  # fmt: skip
NUMBERED = ("post_id", "message_id", "rater")  # of which every row has its own


def rows(row: dict, rng: random.Random) -> list[dict]:
    """A few rows, one of which has a value, a field or a name that it should not have."""
    made = [row | {name: f"{row[name]}{i}" for name in NUMBERED if name in row} for i in range(5)]
    number, name = rng.randrange(5), rng.choice([*row])
    change = rng.randrange(4)
    if change == 0:
        del made[number][name]
    elif change == 1:
        made[number][rng.choice(["\ud800", "x" * 10**5, "", name.upper()])] = 1
    else:
        made[number][name] = misplaced(row[name], rng)
    return made


def table(path: Path, row: dict, rng: random.Random) -> None:
    """A file of rows in one of the formats that are read, with rows or bytes that are wrong."""
    made = rows(row, rng)
    kind = rng.choice(
        ["jsonl", "jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet", "parquet", "json",
         "arrow", "jsonl.gz bomb", "parquet bomb"]
    )  # fmt: skip
    path = path / f"rows.{kind.removesuffix(' bomb')}"
    content = io.BytesIO()
    if kind == "jsonl.gz bomb":
        filling = rng.choice([b"\n", b"x", b"[" * 99 + b"\n", b"{}\n", b'{"a": 1}\n'])
        path.write_bytes(gzip.compress(filling * (2**28 // len(filling)), 1))
        return
    if kind == "parquet bomb":
        texts = pa.array([rng.choice(["x", ""]) * rng.choice([10**4, 3 * 10**7])])
        repeated = pa.DictionaryArray.from_arrays(np.zeros(4000, np.int32), texts)
        columns = dict.fromkeys(row, repeated)
        if rng.random() < 0.5:
            columns[rng.choice([*row])] = pa.ListArray.from_arrays(np.arange(4001), repeated)
        pyarrow.parquet.write_table(pa.table(columns), path, dictionary_pagesize_limit=2**30)
        return
    if kind in ("parquet", "arrow", "csv", "tsv", "csv.gz"):
        frame = as_frame(made)
        if kind == "parquet":
            frame.to_parquet(content, compression=rng.choice(["snappy", "zstd", None]))
        elif kind == "arrow":
            pyarrow.feather.write_feather(frame, content)
        else:
            frame.to_csv(content, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "json":
        content.write(json.dumps(made).encode())
    else:
        content.write("".join(json.dumps(one) + "\n" for one in made).encode())
    content = content.getvalue()
    if rng.random() < 0.5:
        content = damaged(content, rng)
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    if rng.random() < 0.1:
        special_file(path, rng)


def as_frame(made: list[dict]) -> pd.DataFrame:
    """The rows as Arrow has them; where a column has values of several kinds, as texts."""
    names = {name.encode("utf-8", "replace").decode() for one in made for name in one}
    columns = {}
    for name in sorted(names):
        values = [one.get(name) for one in made]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            columns[name] = pa.array([str(x).encode("utf-8", "replace").decode() for x in values])
    return pa.table(columns).to_pandas()


def preferences(folder: Path, rng: random.Random) -> None:
    """Pairs as the first data folder has them."""
    (folder / "shp").mkdir()
    table(folder / "shp", PAIR, rng)


def prompts(folder: Path, rng: random.Random) -> None:
    """Messages as the second one has them."""
    (folder / "oasst").mkdir()
    table(folder / "oasst", MESSAGE, rng)


def given(folder: Path, rng: random.Random) -> None:
    """A file of pairs that is named with PREFERENCES=."""
    table(folder, rng.choice(LAYOUTS), rng)


def archive(path: Path, arrays: dict[str, np.ndarray], rng: random.Random) -> None:
    """Arrays in an npz file, one of them damaged, or the file."""
    broken = rng.choice([*arrays])
    with zipfile.ZipFile(path, "w") as file:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if key == broken and rng.random() < 0.6:
                content = rng.choice([
                    lambda c=content: damaged(c, rng),
                    lambda c=content: re.sub(rb"\d+(?=\)|, \d)", b"9999999999", c, count=1),
                    lambda c=content: c.replace(b"'shape': (", b"'shape': (" + b"(" * 4000),
                    lambda c=content: c[:8] + b"\xff\xff" + c[10:],
                    lambda c=content: re.sub(rb"[|<][uf]\d", b"|O8", c, count=1),
                ])()  # fmt: skip
            method = rng.choice([0, 8, 8, 12, 14])
            file.writestr(f"{key}{rng.choice(['.npy'] * 9 + ['', '.NPY'])}", content, method)
        if rng.random() < 0.05:
            file.writestr("bomb.npy", bytes(2**28), zipfile.ZIP_DEFLATED)
    if rng.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.1:
        special_file(path, rng)


def images(folder: Path, rng: random.Random) -> None:
    """A MedMNIST file that is not one."""
    (folder / "medmnist").mkdir()
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
    archive(folder / "medmnist" / "dermamnist.npz", arrays, rng)


@dataclasses.dataclass(frozen=True)
class Settings:
    lora: None = None
    seeds: tuple[int, ...] = (1,)


SUMMARY = {"gain": {"value": 0.1, "low": 0.0, "high": 0.2}, "parameters": {"decoder": 9}}
LOGGED = [{"step": step, "loss": 0.5, "text": "läng"} for step in (1, 2)]
ARRAYS = {"reward": np.ones(40), "gold.reward": np.ones((4, 2), np.float32)}


def finished_run(folder: Path) -> Path:
    """A run's folder, as training leaves it."""

    def train(run: Run) -> None:
        for row in LOGGED:
            run.log(**row)
        run.save_arrays(**ARRAYS)
        run.finish(**SUMMARY)

    about = {"model": {"name": "m", "file": "f"}}
    return ensure("reward", Settings(), train, inputs={"model": "0"}, about=about, root=folder).path


def run(folder: Path, rng: random.Random) -> None:
    """The files of a run, one of them damaged, or with a value that is another one."""
    folder = finished_run(folder)
    name = rng.choice(["config.json", "summary.json", "metrics.jsonl", "times.jsonl"])
    path = folder / name
    if rng.random() < 0.5:
        indent = None if name.endswith("jsonl") else 1
        lines = path.read_text().splitlines() if indent is None else [path.read_text()]
        lines[-1] = json.dumps(misplaced(json.loads(lines[-1]), rng), indent=indent)
        path.write_text("".join(line + "\n" for line in lines))
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.1:
        special_file(path, rng)


def run_arrays(folder: Path, rng: random.Random) -> None:
    """A run whose arrays are damaged."""
    archive(finished_run(folder) / "arrays.npz", ARRAYS, rng)


def ratings(folder: Path, rng: random.Random) -> None:
    """A file of ratings."""
    path = folder / "ratings.jsonl"
    content = "".join(json.dumps(one) + "\n" for one in rows(RATING, rng)).encode()
    path.write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
    if rng.random() < 0.1:
        special_file(path, rng)


TOML = [
    "5", "true", "nan", "inf", "-1", "0", "1e400", "10.5", '""', '"x"', '"(("', '"' + "x" * 10**6
    + '"', "[]", "[1, 'a']", "[[[]]]", "['']", "[nan, 1]", "{}", "{ value = 'x', from = [] }",
    "{ value = 5, from = nan }", "{ from = 5 }", "1979-05-27", "7" * 5000, "[" * 10**4, "", "\x00",
]  # fmt: skip


def assignment(folder: Path, rng: random.Random) -> None:
    """The teacher's file with a line that is missing, another value, or damaged."""
    lines = PATH.read_text().partition("# Exercises")[0].splitlines()
    number = rng.choice([n for n, line in enumerate(lines) if line[:1] not in ("", "#")])
    name, _, _ = lines[number].partition(" = ")
    lines[number] = f"{name} = {rng.choice(TOML)}" if rng.random() < 0.8 else ""
    content = "\n".join(lines).encode()
    path = folder / "assignment.toml"
    path.write_bytes(damaged(content, rng) if rng.random() < 0.2 else content)
    if rng.random() < 0.1:
        special_file(path, rng)
