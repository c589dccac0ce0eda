"""Whether the hub answers, and what is read where it does not; failures are in tests/rlhf_jax."""

import http.server
import json
import socket
import threading
import time

import datasets
import huggingface_hub.constants
import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data import download, hub


@pytest.fixture
def port(monkeypatch, tmp_path):
    """Points the loaders at a port where nothing listens, and at an empty cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{number}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub.reachable.cache_clear()
    yield number
    hub.reachable.cache_clear()


def serve(port, status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    return server


@pytest.mark.parametrize(("status", "expected"), [(200, True), (503, False)])
def test_hub_is_reachable_only_when_it_answers_well(port, status, expected):
    server = serve(port, status)
    try:
        assert hub.reachable() is expected
    finally:
        server.shutdown()
        server.server_close()


def test_hub_that_refuses_is_not_reachable(port):
    assert not hub.reachable()


def test_silent_hub_is_given_up_within_the_limit(port):
    with socket.create_server(("127.0.0.1", port)):  # accepts and never answers
        started = time.monotonic()
        assert not hub.reachable(0.2)
        assert time.monotonic() - started < 1


def test_offline_mode_asks_nobody(port, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    server = serve(port, 200)
    try:
        assert not hub.reachable()
    finally:
        server.shutdown()
        server.server_close()


def test_earlier_download_is_used_when_the_hub_is_out_of_reach(port, tmp_path):
    cached = tmp_path / "cache" / "owner___some_pairs" / "default" / "0.0.0" / "revision"
    assert not hub.on_hub("owner/SomePairs")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1, "b": "x"}\n')
    datasets.load_dataset(
        "json", data_files={"train": str(rows), "test": str(rows)}, cache_dir=str(tmp_path / "own")
    )
    built = next(tmp_path.glob("own/json/*/*/*/dataset_info.json")).parent
    cached.mkdir(parents=True)
    info = json.loads((built / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "some_pairs"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    for name in ("train", "test"):
        (built / f"json-{name}.arrow").rename(cached / f"some_pairs-{name}.arrow")

    assert hub.on_hub("owner/SomePairs")
    frame = hub.hub_frame("owner/SomePairs", ["b"])
    assert frame.to_dict("list") == {"b": ["x", "x"], "split": ["train", "test"]}


def test_configurations_that_can_be_named_are_told(tmp_path):
    card = "".join(
        f"\n- config_name: {name}\n  data_files: {name}.csv" for name in ("one", "other")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:{card}\n---\n")
    for name in ("one", "other"):
        (tmp_path / f"{name}.csv").write_text("a\n1\n")
    said = download.download("datasets", str(tmp_path), [])
    assert "Config name is missing. Please pick one among the available configs:" in said
    assert "'one'" in said and "'other'" in said and "\n" not in said


def test_hub_that_cannot_deliver_is_one_message_with_the_remedy(port):
    with pytest.raises(UserError, match="owner/nothing.*data directory.*HF_HUB_OFFLINE"):
        hub.hub_frame("owner/nothing", ["a"])
