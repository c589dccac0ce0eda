import errno
import html
import http.client
import re
import signal
import threading
import urllib.parse

import pytest

from experiment_runs.errors import Stopped, UserError
from rlhf_jax import chat
from rlhf_jax.ratings import questionnaire
from rlhf_jax.ratings.questionnaire import Server, form, rate_in_browser, rate_in_terminal
from rlhf_jax.ratings.store import CRITERIA, load_ratings, pending, save_rating

HOSTILE = '<script>alert(1)</script> & "quoted" $nonce {{< meta x >}} \x1b[31m \u202e'
RESPONSES = [
    {"prompt_id": 0, "prompt": "Is <b>this</b> safe?", "model": "ppo-full", "response": HOSTILE},
    {"prompt_id": 0, "prompt": "Is <b>this</b> safe?", "model": "pretrained", "response": ""},
]
SCORES = {criterion: "4" for criterion in CRITERIA}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ratings.jsonl"


@pytest.fixture
def server(path):
    with Server(RESPONSES, path, "Anna", "person") as serving:
        thread = threading.Thread(target=serving.serve_forever, args=[0.01])
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server, method, target, fields=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    body = None if fields is None else urllib.parse.urlencode(fields)
    try:
        connection.request(method, target, body, headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read().decode()
    finally:
        connection.close()


def page(server):
    return ask(server, "GET", f"/?token={server.token}")


def hash_on(content):
    return re.search(r'name="response" value="(\w+)"', content)[1]


def rate(server, key, **changes):
    fields = {"token": server.token, "response": key, **SCORES, "note": "fine"} | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    return ask(server, "POST", "/", fields)


def test_page_is_served_to_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_texts_are_escaped_and_the_model_is_not_named(server, path):
    key = next(k for k, r in pending(RESPONSES, path, "Anna").items() if r["response"] == "")
    _, _, one = page(server)
    save_rating(path, hash_on(one), "Anna", "person", {c: 3 for c in CRITERIA})
    _, _, other = page(server)
    empty, hostile = (one, other) if hash_on(one) == key else (other, one)
    assert "<em>(empty)</em>" in empty
    assert "alert" in hostile and "<script>alert" not in hostile and "\x1b" not in hostile
    shown = html.unescape(re.findall(r'<div class="text" dir="auto">(.*?)</div>', hostile)[1])
    assert shown == HOSTILE.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert not any(model in one + other for model in ("ppo", "pretrained"))


def test_a_question_that_was_cut_is_said_to_be(path, monkeypatch, capsys):
    row = RESPONSES[0] | {"prompt": "one two three four", "read": "one <b>two"}
    said = "The models read only the beginning of this question, up to “one <b>two”."
    assert html.escape(said) in form({"key": row}, 1, "token")
    assert "read only" not in form({"key": row | {"read": ""}}, 1, "token")
    assert "read only" not in form({"key": RESPONSES[0]}, 1, "token")
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    rate_in_terminal([row], path, "Anna", kind="person")
    assert said in capsys.readouterr().out


def test_page_may_run_its_own_script_only(server):
    _, headers, content = page(server)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    nonces = re.findall(r'nonce="([\w-]+)"', content)
    assert len(nonces) == 2 and all(f"'nonce-{n}'" in policy for n in nonces)
    assert nonces != re.findall(r'nonce="([\w-]+)"', page(server)[2])
    assert headers["Referrer-Policy"] == "no-referrer"


def test_requests_without_the_token_or_for_another_host_are_refused(server, path):
    key = hash_on(page(server)[2])
    assert ask(server, "GET", "/")[0] == 403
    assert ask(server, "GET", "/?token=guess")[0] == 403
    assert ask(server, "GET", "/?token=%C3%A9")[0] == 403
    assert rate(server, key, token="guess")[0] == rate(server, key, token=None)[0] == 403
    rebound = f"evil.example:{server.server_port}"
    status, _, content = ask(server, "GET", f"/?token={server.token}", Host=rebound)
    assert status == 403 and "safe" not in content
    assert ask(server, "GET", f"/other?token={server.token}")[0] == 404
    assert load_ratings(path) == []


def test_form_saves_a_rating_and_goes_on_to_the_next(server, path):
    key = hash_on(page(server)[2])
    status, headers, _ = rate(server, key, coherence="1")
    assert (status, headers["Location"]) == (303, f"/?token={server.token}")
    [saved] = load_ratings(path, RESPONSES)
    assert (saved.response_hash, saved.coherence, saved.relevance) == (key, 1, 4)
    assert (saved.rater, saved.rater_kind, saved.note) == ("Anna", "person", "fine")
    assert hash_on(page(server)[2]) != key


def test_form_sent_twice_or_for_an_unknown_response_is_not_saved(server, path):
    key = hash_on(page(server)[2])
    assert [rate(server, k)[0] for k in (key, key, "0" * 16)] == [303] * 3
    assert len(load_ratings(path)) == 1


@pytest.mark.parametrize("score", ["0", "6", "x", "3.5", "", None])
def test_form_with_a_bad_score_is_refused_with_the_reason(server, path, score):
    key = hash_on(page(server)[2])
    status, _, content = rate(server, key, relevance=score)
    assert status == 400 and "relevance has no score from 1 to 5" in content
    assert load_ratings(path) == []


def test_large_or_unmeasured_bodies_are_refused_unread(server):
    assert rate(server, "0" * 16, note="x" * 200_000)[0] == 400
    target = f"/?token={server.token}"
    assert ask(server, "POST", target, None, **{"Content-Length": "many"})[0] == 400


def test_browser_session_ends_when_everything_is_rated(path, monkeypatch, capsys):
    def rate_all(url):
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(.+)", url).groups()

        class Seen:
            server_port = int(port)

        Seen.token = token

        def work():
            for _ in RESPONSES:
                rate(Seen, hash_on(page(Seen)[2]))
            assert "Everything is rated" in page(Seen)[2]

        threading.Thread(target=work).start()
        return True

    monkeypatch.setattr("webbrowser.open", rate_all)
    rate_in_browser(RESPONSES, path, "Anna", kind="ai")
    assert [rating.rater_kind for rating in load_ratings(path)] == ["ai", "ai"]
    assert "All 2 responses are rated." in capsys.readouterr().out


def test_broken_file_is_refused_before_the_browser_opens(path):
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        Server(RESPONSES, path, "Anna", "person")


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_damaged_meanwhile_or_a_full_disk_is_told_on_the_page(
    server, path, monkeypatch, capsys
):
    key = hash_on(page(server)[2])
    path.write_text("{\n")
    status, _, content = page(server)
    assert status == 500 and "line 1: not JSON" in content
    path.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(questionnaire, "save_rating", full)
    status, _, content = rate(server, key)
    assert status == 500 and "No space left" in content
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_to_end_is_not_the_raters_own_end(path, monkeypatch):
    def ended(*_):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("builtins.input", ended)
    monkeypatch.setattr(Server, "serve_forever", ended)
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    for work in (
        lambda: questionnaire.rate_in_terminal(RESPONSES, path, "Anna"),
        lambda: rate_in_browser(RESPONSES, path, "Anna"),
        chat.ask,
    ):
        with pytest.raises(Stopped):
            work()
