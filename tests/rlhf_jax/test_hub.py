"""Model and data sets from a hub on this machine, then from the cache without it.

The server knows as much of the hub's protocol as the official clients use to download.
"""

import contextlib
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import datasets
import huggingface_hub.constants
import jax
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.config import SMOLLM2
from rlhf_jax.data import hub as data_hub
from rlhf_jax.data.preferences import load_preferences
from rlhf_jax.pretrained import hub as model_hub
from rlhf_jax.pretrained import loading
from rlhf_jax.pretrained.tensor_names import huggingface_tensors

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves folders as repositories.

    Args:
      repositories: ("datasets" or "models", "owner/name") to its folder.
      fault: one of FAULTS, in the answers to all addresses that have `where` in them.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[tuple[str, str], Path], fault: str = "", where: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.fault, self.where = repositories, fault, where
        self.asked: list[str] = []
        self.closing = threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=[0.05])
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} /{path}")
        if not path:
            return self.send(b"hub")
        if self.server.fault and self.server.where in path:
            return self.fail(self.server.fault)
        api, parts = path.startswith("api/"), path.removeprefix("api/").split("/")
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        folder = self.server.repositories.get((kind, "/".join(parts[:2])))
        if folder is None:
            return self.missing("RepoNotFound")
        action, rest = (parts[2:] or ["info"])[0], parts[3:]
        if not api and action == "resolve":
            return self.file(folder / "/".join(rest[1:]))
        if api and action in ("info", "revision"):
            names = [{"rfilename": entry["path"]} for entry in entries(folder)]
            about = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "gated": False}
            return self.json(about | {"disabled": False, "tags": [], "siblings": names})
        if api and action == "tree":
            deep = "recursive=true" in self.path.lower()
            found = tree(folder, folder / "/".join(rest[1:]), deep)
            return self.json(found) if found else self.missing("EntryNotFound")
        if api and action == "paths-info":
            wanted = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
            wanted = wanted or json.loads(self.body)["paths"]
            return self.json([e for e in tree(folder, folder, True) if e["path"] in wanted])
        return self.missing("EntryNotFound")

    def file(self, path: Path):
        if not path.is_file():
            return self.missing("EntryNotFound")
        return self.send(path.read_bytes(), **{"X-Repo-Commit": COMMIT, "ETag": f'"{oid(path)}"'})

    def json(self, value):
        self.send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def missing(self, code: str):
        self.send(b"{}", 404, **{"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, fault: str):
        length = 10**12 if fault == "huge" else 10**5
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif fault == "html":
            self.send(b"<!DOCTYPE html><html>Sign in</html>", **{"Content-Type": "text/html"})
        elif fault == "redirect":
            self.send(b"", 302, Location=f"{self.path}{'&' if '?' in self.path else '?'}again")
        elif fault == "500":
            self.send(b"oops", 500)
        elif fault in ("silence", "truncated", "huge"):
            self.send_response(200)
            for name, value in {"ETag": '"1"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{")
                with contextlib.suppress(OSError):
                    while fault == "huge" and not self.server.closing.is_set():
                        self.wfile.write(bytes(2**20))
            if fault == "silence":
                self.server.closing.wait(60)
            self.close_connection = True
        elif fault == "length":
            content = b"x" * 9
            self.send(content, **{"ETag": '"1"', "X-Repo-Commit": COMMIT})

    def log_message(self, *_):
        pass


FAULTS = ("reset", "html", "redirect", "500", "silence", "truncated", "length", "huge")


def tree(folder: Path, inside: Path, deep: bool) -> list[dict]:
    """Files and folders as the hub lists them."""
    return [
        {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": COMMIT, "size": 0}
        if path.is_dir()
        else {"type": "file", "path": path.relative_to(folder).as_posix(), "oid": oid(path),
              "size": path.stat().st_size}
        for path in sorted(inside.rglob("*") if deep else inside.glob("*"))
    ]  # fmt: skip


def entries(folder: Path) -> list[dict]:
    return [entry for entry in tree(folder, folder, deep=True) if entry["type"] == "file"]


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def repositories(model, tmp_path):
    """A model in shards, SHP in its folders, OASST in its parquet files, HH-RLHF's dialogues."""
    found = {}
    for kind, name in (
        ("models", "owner/tiny"), ("datasets", "stanfordnlp/SHP"),
        ("datasets", "OpenAssistant/oasst1"), ("datasets", "Anthropic/hh-rlhf"),
    ):  # fmt: skip
        found[kind, name] = tmp_path / "hub" / name
        found[kind, name].mkdir(parents=True)
        (found[kind, name] / "README.md").write_text(f"# {name}\n")
    write_model(model, found["models", "owner/tiny"])
    for domain in ("askbaking", "legaladvice"):
        for split in ("train", "validation", "test"):
            rows = [shp_row(domain, split, i) for i in range(4)]
            write_lines(found["datasets", "stanfordnlp/SHP"] / domain / f"{split}.json", rows)
    for split in ("train", "validation"):
        folder = found["datasets", "OpenAssistant/oasst1"] / "data"
        folder.mkdir(exist_ok=True)
        rows = [oasst_row(split, i) for i in range(5)]
        pd.DataFrame(rows).to_parquet(folder / f"{split}-00000-of-00001-b42a775f407cee45.parquet")
    for split in ("train", "test"):
        asked = [f"\n\nHuman: Question {split} {i}?\n\nAssistant: " for i in range(3)]
        rows = [{"chosen": f"{x}Yes.", "rejected": f"{x}No."} for x in asked]
        write_lines(found["datasets", "Anthropic/hh-rlhf"] / f"{split}.jsonl", rows)
    return found


def write_model(model, folder):
    tensors = huggingface_tensors(model.state, model.config)
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: np.asarray(tensors[name]) for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(dict(model.huggingface_config)))
    model.tokenizer.huggingface.save_pretrained(folder)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shp_row(domain, split, i):
    return {
        "post_id": f"{domain}{split}{i}", "domain": f"{domain}_{split}", "upvote_ratio": 0.9,
        "history": f"Question {domain} {split} {i}?", "labels": i % 2, "score_ratio": 3.0,
        "human_ref_A": "" if i == 3 else f"A {domain} {split} {i}", "score_A": 3, "score_B": 1,
        "human_ref_B": f"B {domain} {split} {i}",
    }  # fmt: skip


def oasst_row(split, i):
    return {
        "message_id": f"{split}{i}", "parent_id": None, "message_tree_id": f"{split}{i}",
        "text": f"Question {split} {i}?", "role": "prompter", "lang": "en", "deleted": i == 4,
        "review_result": None if i == 0 else i != 3,
    }  # fmt: skip


SCRIPT = """
import dataclasses, json, sys
from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from rlhf_jax.config import SMOLLM2
from rlhf_jax.data import hub as data_hub
from rlhf_jax.data.preferences import load_preferences
from rlhf_jax.pretrained import hub as model_hub
from rlhf_jax.pretrained import loading
from rlhf_jax.data.preferences import load_preferences
from rlhf_jax.data.prompts import load_prompts
from rlhf_jax.pretrained import hub, loading
import jax
sources = [load_preferences(None)[1], load_prompts(None)[1],
           load_preferences(None, "Anthropic/hh-rlhf")[1],
           load_prompts(None, "Anthropic/hh-rlhf")[1]]
path = hub.find("owner/tiny")
loaded = loading.load(path, name="owner/tiny", dtype="float32")
leaves = [jax.device_get(leaf) for leaf in jax.tree.leaves(loaded.state)]
json.dump([[dataclasses.asdict(s) for s in sources], fingerprint(*leaves)], sys.stdout)
"""


def read(address, home):
    """What a process of its own reads through the hub at an address."""
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=PROJECT, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_what_the_hub_gives_is_read_again_without_it(repositories, model, tmp_path):
    with Hub(repositories) as hub:
        address = hub.address
        online = read(address, tmp_path / "home")
        assert any("safetensors" in line for line in hub.asked)
    shp, oasst, pairs, questions = online[0]
    assert {source["kind"] for source in online[0]} == {"hub"}
    assert (shp["rows"], shp["note"]) == (18, "6 rows without a question or an answer left out")
    assert oasst["rows"] == 6 and "4 deleted or rejected in review" in oasst["note"]
    assert (pairs["rows"], questions["rows"]) == (6, 6)
    leaves = [jax.device_get(leaf) for leaf in jax.tree.leaves(model.state)]
    assert online[1] == fingerprint(*leaves)
    assert read(address, tmp_path / "home") == online  # nobody answers there any more


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """A function that points this process at a hub with an empty cache."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(data_hub, "LARGEST", 10**8)

    def point(hub):
        monkeypatch.setenv("RLHF_HUB_SECONDS", "1" if hub.fault else "30")  # is waited for
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        data_hub.reachable.cache_clear()

    yield point
    data_hub.reachable.cache_clear()


ON_THE_WAY = [(fault, "tokenizer.json") for fault in FAULTS] + [
    ("silence", "config.json"), ("silence", "safetensors"), ("truncated", "safetensors"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_fails_is_told_and_the_packaged_model_serves(fault, repositories, ask, capsys):
    with Hub(repositories, fault, "api/") as hub:
        ask(hub)
        began = time.monotonic()
        with pytest.raises(UserError, match="owner/tiny: neither on disk nor on the hub [(].{5}"):
            model_hub.find("owner/tiny")
        assert model_hub.find(SMOLLM2).suffix == ".gguf"
        assert time.monotonic() - began < 60
    assert "the hub failed" in (said := capsys.readouterr().err) and "read from llm_smol" in said


@pytest.mark.parametrize(("fault", "where"), ON_THE_WAY)
def test_a_file_of_a_model_that_fails_on_its_way_is_one_message(fault, where, repositories, ask):
    with Hub(repositories, fault, where) as hub:
        ask(hub)
        began = time.monotonic()
        with pytest.raises(UserError, match="owner(/|--)tiny"):
            loading.load(model_hub.find("owner/tiny"), name="tiny")
        assert time.monotonic() - began < 60


def test_an_earlier_download_is_read_where_the_hub_fails(repositories, ask):
    with Hub(repositories) as hub:
        ask(hub)
        found, (frame, _) = model_hub.find("owner/tiny"), load_preferences(None)
    with Hub(repositories, "500", "api/") as hub:
        ask(hub)
        assert model_hub.find("owner/tiny") == found
        assert load_preferences(None)[0].equals(frame)


def test_of_a_repository_of_gguf_files_the_one_that_is_named_is_downloaded(repositories, ask):
    folder = repositories["models", "owner/tiny"]
    for path in folder.iterdir():
        path.unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(name.encode())
    with Hub(repositories) as hub:
        ask(hub)
        with pytest.raises(UserError, match="MODEL=owner/tiny:FILE.gguf"):
            model_hub.find("owner/tiny")
        assert model_hub.find("owner/tiny:b.gguf").read_bytes() == b"b.gguf"
        with pytest.raises(UserError, match="no such GGUF file"):
            model_hub.find("owner/tiny:c.gguf")
        assert not any("a.gguf" in line for line in hub.asked if "resolve" in line)


@pytest.mark.parametrize("where", ["api/", "SHP/resolve"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_data_set_that_fails_on_its_way_is_one_message(fault, where, repositories, ask):
    with Hub(repositories, fault, where) as hub:
        ask(hub)
        began = time.monotonic()
        with pytest.raises(UserError, match="stanfordnlp/SHP.*local copy.*stand-in"):
            load_preferences(None)
        assert time.monotonic() - began < 60
