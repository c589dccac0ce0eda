import gzip
import json
import os

import pandas as pd
import pyarrow.parquet
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import tables
from rlhf_jax.data.prompts import load_prompts


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"]
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = pd.DataFrame({"text": ["eins, zwei", "drei"], "votes": [3, 4]})
    path = tmp_path / "deeper" / name
    path.parent.mkdir()
    if name.endswith("parquet"):
        rows.to_parquet(path)
    elif ".csv" in name:
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True)
    [(found, frame)] = tables.tables(tmp_path)
    assert found == path
    if ".csv" in name:
        rows = rows.astype(str)
    assert frame.to_dict("list") == rows.to_dict("list")
    assert list(frame.index) == [1, 2]
    assert frame.index.name == ("line" if ".json" in name else "row")


def read(folder, content, name="a.jsonl"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(tables.tables(folder))


def test_broken_line_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not a JSON object.*repair or delete"):
        read(tmp_path, '{"text": "x", "votes": 1}\n\n{"text": "y", \n')
    with pytest.raises(UserError, match=r"line 1: not a JSON object"):
        read(tmp_path, "7\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x", "votes": 1}\n' * 99, mtime=0)[:-12]),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl", b'{"text": "\xff", "votes": 1}\n'),
        ("a.parquet", b"no parquet"),
        ("a.csv", b'"'),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content):
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        read(tmp_path, content, name)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.jsonl: the file has no rows"):
        read(tmp_path, content)


def test_missing_folder_tells_the_layout(tmp_path):
    with pytest.raises(
        UserError, match=r"shp: no data file.*shp/ with preference pairs and oasst/"
    ):
        list(tables.tables(tmp_path / "shp"))


def test_half_a_surrogate_pair_does_not_break_the_encoding(tmp_path):
    [(_, frame)] = read(tmp_path, '{"text": "cut \\ud83d", "votes": 1}\n')
    assert frame["text"].item() == "cut ?"


def gz(content):
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1: nested too deeply"),
        ("a.jsonl", b'{"votes": ' + b"7" * 5000 + b"}", "line 1: not a JSON object .*4300 digits"),
        ("a.jsonl", b'{"text": "' + b"x" * 2**24 + b'"}', "line 1 is longer than"),
        ("a.jsonl.gz", gz(b"\n" * 2**26 + b"x"), "100,000 lines of less than 20 bytes each"),
        ("a.jsonl.gz", gz(b"x" * 2**27), "is longer than"),
        ("a.csv.gz", gz(b"text,votes\n" + b"x" * 2**27), "unpacks to more than 67,108,864 bytes"),
        ("a.csv", b"," * 5000 + b"\n", "more than 1000 columns"),
        ("a.csv", b"x" * 2**16, "no line with their names"),
        ("a.jsonl", b"\n".join(b'{"a%d": 1}' % i for i in range(1002)), "more than 1000 fields"),
        ("a.csv", b"a,b\n1,2,3,4\n1,2\n1,2,3,4,5\n", "cannot be read"),
        ("a.jsonl", '{"text": "x", "votes": 1}\n'.encode("utf-16"), "cannot be read"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "cannot be read"),
    ],
)
def test_files_that_would_take_all_time_or_memory_are_one_message(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, content, name)
    assert len(str(error.value)) < 600


def test_a_parquet_file_of_a_thousand_times_its_size_is_refused(tmp_path):
    word = pyarrow.array(["x" * 10**6]).dictionary_encode().dictionary
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10**4, "int32"), word)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 2 * 10**6
    with pytest.raises(UserError, match="a.parquet: cannot be read .it unpacks to more than"):
        list(tables.tables(tmp_path))


def test_a_parquet_file_whose_texts_are_no_texts_is_refused(tmp_path):
    sizes, content = pyarrow.array([b"text", b"p\xff"], pyarrow.binary()).buffers()[1:]
    texts = pyarrow.StringArray.from_buffers(2, sizes, content)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: cannot be read .*UTF8"):
        list(tables.tables(tmp_path))


def test_columns_of_a_parquet_file_lose_what_pandas_adds_to_them(tmp_path):
    frame = pd.DataFrame(
        {"text": pd.Categorical(["x", "y"]), "votes": pd.array([1, None], "Int64")}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    [(_, found)] = tables.tables(tmp_path)
    assert found["text"].tolist() == ["x", "y"] and found["votes"].isna().tolist() == [False, True]
    assert not any(isinstance(kind, pd.CategoricalDtype | pd.Int64Dtype) for kind in found.dtypes)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: not a regular file"):
        list(tables.tables(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.csv").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"b\.csv: not a regular file"):
        list(tables.tables(tmp_path))


def test_long_values_and_names_are_cut_in_messages(tmp_path):
    names = {f"{i}" + "x" * 1000: 1 for i in range(100)}
    [(path, _)] = read(tmp_path, json.dumps(names | {"\ud800": 1}))
    with pytest.raises(UserError, match="no prompts in its columns") as error:
        load_prompts(None, str(path))
    assert len(str(error.value)) < 2000


def test_content_fingerprint_tells_contents_apart():
    frame = pd.DataFrame({"a": ["x", "y"], "b": [1, 2]})
    same = tables.content_fingerprint(frame)
    assert same == tables.content_fingerprint(frame.copy())
    others = [frame[::-1], frame.rename(columns={"a": "c"}), frame.assign(a=["x", "z"])]
    assert same not in [tables.content_fingerprint(other) for other in others]
