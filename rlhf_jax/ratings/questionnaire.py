"""The questionnaire for ratings, in the terminal or on a local page: blind, in random order.

Every rating is in the file as soon as it is given, so that the same command goes on where a rater
stopped. The page is served to this machine only. What a model wrote is text on it, never markup,
and the page may load or send nothing (Content-Security-Policy).
"""

import contextlib
import html
import http.server
import secrets
import string
import threading
import urllib.parse
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiment_runs.errors import Stopped, UserError
from rlhf_jax.ratings.plain_text import block, printable, read_until
from rlhf_jax.ratings.store import (
    CRITERIA,
    EXPLAINED,
    Kind,
    Response,
    by_hash,
    label,
    pending,
    save_rating,
)

PAGE = string.Template(Path(__file__).with_name("questionnaire.html").read_text(encoding="utf-8"))
LARGEST_FORM = 100_000  # bytes


def rate_in_terminal(
    responses: Sequence[Response], path: Path, rater: str, *, kind: Kind = "person"
) -> None:
    """Asks for the ratings that a rater has not given yet, one response at a time, blind.

    Args:
      responses: what is to be rated; which model wrote it is not shown.
      path: the file of ratings; every rating is in it as soon as it is given.
      rater: who rates.
      kind: a person, or an AI system that reads them.
    """
    left = pending(responses, path, rater)
    print("\nScores from 1 (worst) to 5; b goes back, q stops and keeps what was rated.")
    for number, (key, row) in enumerate(left.items(), start=1):
        print(f"\n{'=' * 20} {number} of {len(left)} {'=' * 20}")
        print(f"\nQuestion\n\n{block(row['prompt'])}\n")
        if row.get("read"):
            print(f"{printable(read_until(row['read']))}\n")
        print(f"Answer\n\n{block(row['response'])}\n")
        try:
            scores = ask_scores()
            note = input("a note, or nothing: ") if scores else ""
        except Stopped:  # by a signal to end
            raise
        except (EOFError, KeyboardInterrupt):
            scores = None
        if scores is None:
            print(f"\nStopped; {len(left) - number + 1} left. The same command goes on here.")
            return
        save_rating(path, key, rater, kind, scores, note)
    print(f"\nAll {len(by_hash(responses))} responses are rated. Thank you, {rater}.")


def ask_scores() -> dict[str, int] | None:
    """One score for each criterion; None when the rater stops."""
    scores: dict[str, int] = {}
    while len(scores) < len(CRITERIA):
        criterion = list(CRITERIA)[len(scores)]
        for score, meaning in zip(EXPLAINED, CRITERIA[criterion], strict=True):
            print(f"    {score}  {meaning}")
        answer = input(f"{label(criterion)}: ").strip().lower()
        if answer == "q":
            return None
        if answer == "b":
            scores = dict(list(scores.items())[:-1])
        elif answer in {"1", "2", "3", "4", "5"}:
            scores[criterion] = int(answer)
        else:
            print("    please type 1, 2, 3, 4 or 5, b to go back, q to stop")
    return scores


def rate_in_browser(
    responses: Sequence[Response], path: Path, rater: str, *, kind: Kind = "person"
) -> None:
    """The same on a page in the browser; returns when everything is rated, or at Ctrl-C."""
    with Server(responses, path, rater, kind) as serving:
        print(f"Rate on this page; Ctrl-C here stops, the same command goes on.\n{serving.url}")
        webbrowser.open(serving.url)
        try:
            serving.serve_forever()
        except Stopped:  # by a signal to end
            raise
        except KeyboardInterrupt:
            print()
    left = len(pending(responses, path, rater))
    print(f"{left} left." if left else f"All {len(by_hash(responses))} responses are rated.")


class Server(http.server.ThreadingHTTPServer):
    """Serves the questionnaire of one rater on a free port of the loopback interface.

    Every request must carry the random token of its address, and name this machine as its host:
    other pages in the same browser can neither rate nor read what is asked.
    """

    def __init__(self, responses: Sequence[Response], path: Path, rater: str, kind: Kind):
        self.responses, self.path, self.rater, self.kind = responses, path, rater, kind
        self.total = len(by_hash(responses))
        self.token = secrets.token_urlsafe(16)
        self.one_at_a_time = threading.Lock()
        self.left()  # refuses a broken file before the browser opens
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def left(self) -> dict[str, Response]:
        with self.one_at_a_time:
            return pending(self.responses, self.path, self.rater)

    def accept(self, fields: Mapping[str, Sequence[str]]) -> None:
        """Saves a rating, unless this rater has given it: sent twice, or from an old page."""
        key, note = (fields.get(name, [""])[0] for name in ("response", "note"))
        scores = {}
        for criterion in CRITERIA:
            score = fields.get(criterion, [""])[0]
            if score not in {"1", "2", "3", "4", "5"}:
                raise UserError(
                    f"{label(criterion)} has no score from 1 to 5; go back and give one"
                )
            scores[criterion] = int(score)
        with self.one_at_a_time:
            if key in pending(self.responses, self.path, self.rater):
                save_rating(self.path, key, self.rater, self.kind, scores, note)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the browser: a page with the next response, and the form that comes back."""

    server: Server
    timeout = 60  # seconds; browsers open connections that they may never use

    def do_GET(self):
        with self.told():
            self.show()

    def do_POST(self):
        with self.told():
            self.save()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside, what is wrong with the file or the disk is the answer."""
        try:
            yield
        except ConnectionError:  # the browser has gone
            self.close_connection = True
        except (UserError, OSError) as error:
            self.reply(500, html.escape(str(error)))

    def show(self) -> None:
        """Answers with the next response, or with thanks."""
        address = urllib.parse.urlsplit(self.path)
        if address.path != "/":
            self.reply(404, "There is nothing here.")
        elif self.allowed(urllib.parse.parse_qs(address.query)):
            left = self.server.left()
            if left:
                self.reply(200, form(left, self.server.total, self.server.token))
            else:
                self.reply(200, thanks(self.server.rater))
                threading.Thread(target=self.server.shutdown).start()

    def save(self) -> None:
        """Saves what the form says."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_FORM:
            self.reply(400, "This is not a rating.")
            return
        fields = urllib.parse.parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        if not self.allowed(fields):
            return
        try:
            self.server.accept(fields)
        except UserError as error:
            self.reply(400, html.escape(str(error)))
            return
        self.send_response(303)
        self.send_header("Location", f"/?token={self.server.token}")
        self.end_headers()

    def allowed(self, fields: Mapping[str, Sequence[str]]) -> bool:
        """True for requests that come from the page itself; refuses any other."""
        given = fields.get("token", [""])[0].encode()
        hosts = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        own = secrets.compare_digest(given, self.server.token.encode())
        if not own or self.headers.get("Host") not in hosts:
            self.reply(403, "Open the whole address that the command printed.")
            return False
        return True

    def reply(self, status: int, body: str) -> None:
        nonce = secrets.token_urlsafe(16)
        page = PAGE.substitute(body=body, nonce=nonce).encode()
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(page)),
            "Content-Security-Policy": (
                f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        """Requests are not worth a line in the terminal."""


def form(left: Mapping[str, Response], total: int, token: str) -> str:
    """The page's content for the first response that is left; it does not say who wrote it."""
    key, row = next(iter(left.items()))
    cut = f"<p>{text(read_until(row['read']))}</p>" if row.get("read") else ""
    groups = "".join(fieldset(criterion) for criterion in CRITERIA)
    return f"""
<p>Response {total - len(left) + 1} of {total}</p>
<h1>Question</h1><div class="text" dir="auto">{text(row["prompt"])}</div>{cut}
<h1>Answer</h1><div class="text" dir="auto">{text(row["response"])}</div>
<form method="post" action="/">
<input type="hidden" name="token" value="{token}">
<input type="hidden" name="response" value="{key}">
{groups}
<label>Note, if you like <textarea name="note" rows="2" maxlength="2000"></textarea></label>
<button>Save and go on</button>
<p>Keys: 1 to 5 score and move on, the arrows up and down choose the line, Enter saves.</p>
</form>"""


def fieldset(criterion: str) -> str:
    """One criterion with its five choices and what they mean."""
    meanings = dict(zip(EXPLAINED, CRITERIA[criterion], strict=True))
    choices = "".join(
        f'<label><input type="radio" name="{criterion}" value="{score}" required> {score}'
        f"<small>{meanings.get(score, '')}</small></label>"
        for score in range(1, 6)
    )
    return f"<fieldset><legend>{label(criterion)}</legend>{choices}</fieldset>"


def text(written: str) -> str:
    """Any text as text of a page."""
    return html.escape(printable(written)) if written.strip() else "<em>(empty)</em>"


def thanks(rater: str) -> str:
    return f"<h1>Everything is rated.</h1><p>Thank you, {html.escape(rater)}. Close this page.</p>"
