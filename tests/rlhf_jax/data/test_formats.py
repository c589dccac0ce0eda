"""Files as programs write them: which are read, and what is said of the others."""

import codecs
import gzip
import json
import lzma

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import formats, tables

ROWS = [{"text": "Why, oh; why?", "votes": "3"}, {"text": "größer", "votes": "007"}]


def read(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    [(_, frame)] = tables.tables(folder)
    return frame


@pytest.mark.parametrize("name", ["a.json", "A.JSON", "a.jsonl"])
@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8, b"\r\n "])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_gives_its_rows(tmp_path, name, start, indent):
    frame = read(tmp_path, name, start + json.dumps(ROWS, indent=indent).encode() + b"\r\n")
    assert frame.to_dict("records") == ROWS
    assert (frame.index.name, [*frame.index]) == ("row", [1, 2])


def test_an_array_is_read_in_pieces(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [{"text": "[{,ü" * rng.integers(9), "votes": [{}] * rng.integers(3)} for _ in "x" * 99]
    monkeypatch.setattr(formats, "LONGEST_LINE", 120)
    content = json.dumps(rows, ensure_ascii=False, indent=1)
    assert read(tmp_path, "a.json", content).to_dict("records") == rows
    with pytest.raises(UserError, match="a.json, row 1: not a JSON object .*longer than 120"):
        read(tmp_path, "a.json", json.dumps([{"text": "x" * 150}]))
    with pytest.raises(UserError, match="a.json, row 1: not a JSON object"):
        read(tmp_path, "a.json", json.dumps([{"text": "x" * 500}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"} {"text": "y"}]', "row 1: not a JSON object .no comma"),
        ('[{"text": "x"}, 3]', "row 2: not a JSON object .a value of another kind"),
        ('[{"text": "x"},', "row 2: not a JSON object .*objects, one a line or all in one array"),
        ('[{"text": "x"}]\n{}', "more behind the end"),
        ("[" * 10**5, "row 1: nested too deeply"),
        ("[]", "the file has no rows"),
        ('{\n "data": [{"text": "x"}]\n}', "line 1: not a JSON .*one a line or all in one array"),
    ],
)
def test_a_wrong_array_is_told_by_its_row(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"a\.json.*{message}"):
        read(tmp_path, "a.json", content)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_tables_of_spreadsheets_are_read(tmp_path, name, mark, start, end):
    text = pd.DataFrame(ROWS).to_csv(index=False, sep=mark, lineterminator=end)
    assert read(tmp_path, name, start + text.encode()).to_dict("records") == ROWS


@pytest.mark.parametrize("names", ["text", "text,votes"])
def test_values_that_are_not_quoted_are_refused(tmp_path, names):
    row = "Why, oh why?" + ",3" * names.count(",")
    with pytest.raises(UserError, match="a.csv: cannot be read .more values than names; quote"):
        read(tmp_path, "a.csv", f"{names}\n{row}\n{row}\n")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_other_encodings_are_refused_with_the_right_one(tmp_path, encoding):
    with pytest.raises(UserError, match="a.csv: cannot be read .*save it as UTF-8"):
        read(tmp_path, "a.csv", "text,votes\ngrößer,3\n".encode(encoding))


@pytest.mark.parametrize("name", ["b.jsonl.xz", "b.JSON.zst", "b.csv.zip", "b.parquet.bz2"])
def test_a_packed_file_beside_others_is_not_passed_over(tmp_path, name):
    (tmp_path / name).write_bytes(lzma.compress(b"{}"))
    with pytest.raises(UserError, match=rf"{name}: packed in a way.*unpack it, or use gzip"):
        list(tables.tables(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_that_git_left_is_told(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(UserError, match=f"{name}: git has left a pointer.*git lfs pull"):
        read(tmp_path, name, pointer)


def test_links_to_folders_are_followed_once(tmp_path):
    for folder in ("data", "elsewhere/deeper"):
        (tmp_path / folder).mkdir(parents=True)
    pd.DataFrame(ROWS).to_parquet(tmp_path / "elsewhere" / "deeper" / "b.parquet")
    pd.DataFrame(ROWS).to_parquet(tmp_path / "data" / "a.parquet")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    found = formats.data_files(tmp_path / "data")
    assert [path.name for path in found] == ["a.parquet", "b.parquet"]


def test_a_folder_of_parts_that_is_named_like_a_file_is_read(tmp_path):
    """As Spark writes them."""
    folder = tmp_path / "pairs.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.snappy.parquet.crc").touch()
    pd.DataFrame(ROWS).to_parquet(folder / "part-0.snappy.parquet")
    [(_, frame)] = tables.tables(tmp_path)
    assert frame.to_dict("records") == ROWS


def test_one_text_that_fills_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """A million letters in some hundred bytes; the file says of itself how many they are."""
    pd.DataFrame({"prompt": ["x" * 10**6]}).to_parquet(tmp_path / "x.parquet", compression="zstd")
    monkeypatch.setattr(formats, "SMALL_CONTENT", 10**5)
    monkeypatch.setattr(
        formats.pyarrow.parquet.ParquetFile, "iter_batches", lambda *_: pytest.fail("unpacked")
    )
    with pytest.raises(UserError, match="it unpacks to more than 100,000 bytes"):
        formats.table(tmp_path / "x.parquet")


@pytest.mark.parametrize("nested", ["", "list", "map"])
def test_one_text_that_many_rows_have_is_refused_before_it_is_written_out(
    tmp_path, monkeypatch, request, nested
):
    """Parquet keeps it once: a file of some hundred bytes would fill memory."""
    column = pa.array(["x" * 5 * 10**5]).take([0] * 200)
    if nested == "list":
        column = pa.StructArray.from_arrays([pa.ListArray.from_arrays(range(201), column)], ["a"])
    elif nested == "map":
        column = pa.MapArray.from_arrays(range(201), pa.array(["a"] * 200), column)
    pyarrow.parquet.write_table(
        pa.table({"text": column}), tmp_path / "x.parquet", compression="zstd"
    )
    del column
    assert (tmp_path / "x.parquet").stat().st_size < 10**4
    held, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)  # which counts from nothing
    request.addfinalizer(lambda: pa.set_memory_pool(held))
    monkeypatch.setattr(formats, "SMALL_CONTENT", 5 * 10**6)
    monkeypatch.setattr(formats, "whole_frame", lambda _: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="it unpacks to more than 5,000,000 bytes"):
        formats.table(tmp_path / "x.parquet")
    assert pool.max_memory() < 2 * 10**7


def test_repeated_texts_come_back_as_they_were(tmp_path):
    """However the file keeps them, and in more than one piece."""
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": None}]
    rows = [{"text": "abc"[i % 3], "turns": turns[: i % 3], "votes": i} for i in range(9000)]
    rows[5]["text"] = None
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    pd.DataFrame(rows).astype({"text": "category"}).to_parquet(tmp_path / "y.parquet")
    for frame in (formats.table(tmp_path / name) for name in ("x.parquet", "y.parquet")):
        assert [*frame["votes"]] == [*range(9000)] and [*map(list, frame["turns"])] == [
            row["turns"] for row in rows
        ]
        assert [x if isinstance(x, str) else None for x in frame["text"]] == [
            row["text"] for row in rows
        ]


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ","), ("a.csv.gz", ",")])
def test_a_quotation_mark_that_swallows_rows_is_told(tmp_path, name, mark):
    """Texts that begin with one, in a file that quotes nothing."""
    rows = [["text", "votes"], *([f"good {i}", str(i)] for i in range(12))]

    def read_with(first, second):
        rows[3][0], rows[8][0] = first, second
        content = "".join(mark.join(row) + "\n" for row in rows).encode()
        return read(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)

    with pytest.raises(UserError, match="cannot be read .*line 9: .*quote texts with quotation"):
        read_with('"Yes, said Tom.', '"No" he said')
    assert len(read_with('"Yes, said ""Tom"".\nSo"', 'a "No" he said')) == 12
