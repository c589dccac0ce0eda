"""The questionnaire in a real browser, by its keys alone; skipped where there is no Chromium."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from rlhf_jax.ratings.questionnaire import Server
from rlhf_jax.ratings.store import CRITERIA, load_ratings

RESPONSES = [
    {"prompt_id": 0, "prompt": "Why?", "model": name, "response": f"Because {k}."}
    for k, name in enumerate(("pretrained", "ppo-full", "ppo-lora"))
]


@pytest.fixture
def browser():
    """A function that sends a command to Chromium by the WebDriver protocol."""
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("needs chromium and chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def send(path, body=None, method=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/session{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options = {"goog:chromeOptions": {"binary": shutil.which("chromium"), "args": arguments}}
    try:
        for _ in range(100):
            try:
                session = send("", {"capabilities": {"alwaysMatch": options}})["sessionId"]
                break
            except urllib.error.URLError:  # it is not listening yet
                time.sleep(0.2)
        yield lambda path, body=None: send(f"/{session}{path}", body)
        send(f"/{session}", method="DELETE")  # closes the browser
    finally:
        driver.terminate()
        driver.wait(10)


@pytest.mark.slow
def test_a_rater_scores_with_the_keys_1_to_5_and_saves_with_enter(browser, tmp_path):
    with Server(RESPONSES, tmp_path / "ratings.jsonl", "Ada", "person") as server:
        serving = threading.Thread(target=server.serve_forever, args=[0.01])
        serving.start()
        browser("/url", {"url": server.url})
        for number in range(len(RESPONSES)):
            body = browser("/element", {"using": "css selector", "value": "body"})
            assert f"Response {number + 1} of 3" in browser(f"/element/{[*body.values()][0]}/text")
            keys = [str(1 + (number + k) % 5) for k in range(len(CRITERIA))]
            typed = [
                {"type": kind, "value": key}
                for key in [*keys, "\ue007"]  # Enter
                for kind in ("keyDown", "keyUp")
            ]
            browser("/actions", {"actions": [{"type": "key", "id": "keys", "actions": typed}]})
            deadline = time.monotonic() + 30
            while len(load_ratings(server.path)) == number and time.monotonic() < deadline:
                time.sleep(0.1)
        serving.join(30)
        assert "Everything is rated" in browser("/source")
    given = load_ratings(tmp_path / "ratings.jsonl")
    scores = [[getattr(rating, name) for name in CRITERIA] for rating in given]
    assert scores == [[1 + (number + k) % 5 for k in range(5)] for number in range(3)]
