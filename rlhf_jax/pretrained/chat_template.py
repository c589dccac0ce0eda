"""A model's chat template: what stands around a prompt and a reply, as text and as tokens."""

import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError
from rlhf_jax.data.dialogues import Turn, messages

MARK = "\N{BLACK SQUARE}mark\N{BLACK SQUARE}"
PROGRAM = Path(__file__).with_name("render.py")
# A template may loop or grow without end.
SECONDS = 3  # of the processor, for all its renderings together
MEMORY = 2**29  # bytes
CHARACTERS = 100_000  # of a rendering
# Texts at whose edges tokenizers read template and text together.
PROBES = (
    "word", "Two words", "42 is", "(x)", "Ends.", "ends)", "1", "é", "東京", "🙂", "a\n\nb",
    "  two spaces before", "\nline", "\n\n1. item", "after ", "after\n", "tab\t", "a\n\n\n", ".\n",
)  # fmt: skip

# With which a template lets a model that always thinks begin; it would have to be closed again.
THOUGHTS = re.compile(
    r"(?i)[<\[\N{WHITE LEFT-POINTING TRIANGLE}]\|?(?:\w+:)?(?:think|thought|reason)\w*"
    r"\|?[>\]\N{WHITE RIGHT-POINTING TRIANGLE}]\s*\Z"
)
# Whatever is rendered: a slot may keep or drop the white space around a text.
TEXTS = tuple(
    dict.fromkeys(
        [MARK, "a", *(kept for text in PROBES for kept in (text, text.strip(), text.lstrip()))]
    )
)


class Slot(NamedTuple):
    """How a text is read where the template puts it, so that its tokens are those of the whole.

    A sentence-piece model marks the start of whatever it reads: the text is read behind a piece of
    the template, `lead`, whose tokens are then left out. Spaces of the template that make one token
    with the text's first word are read with it, `glued`. White space around the text that the
    template drops, or that makes one token with what follows, is dropped (`trimmed`).
    """

    lead: str
    glued: str
    trimmed: bool


class Fit(NamedTuple):
    """Tokens before a text, how it is read, and the tokens after it."""

    before: tuple[int, ...]
    slot: Slot
    after: tuple[int, ...]


class ChatTemplate:
    """The template as functions of what stands in it.

    The system message is empty, so that models whose template adds a default one get none; it is
    left out where the template has no system role or writes it into the user's turn.
    """

    def __init__(self, huggingface: PreTrainedTokenizerFast):
        self.huggingface = huggingface
        self.rendered = rendered(
            huggingface.chat_template,
            json.dumps(huggingface.special_tokens_map),
            huggingface.name_or_path,
        )
        self.system = False
        without = self.prompt(MARK)
        self.system = True
        try:
            with_system = self.prompt(MARK)
        except UserError:
            with_system = None
        if with_system is None or (
            len(with_system) > len(without) and self.turns(with_system) <= self.turns(without)
        ):
            self.system = False
        if found := THOUGHTS.search(without):
            raise UserError(
                f"{huggingface.name_or_path}: the chat template begins every answer inside "
                f"{found.group().strip()} and does not obey enable_thinking=False: thoughts would "
                "be trained and judged, not replies. Choose an instruct model of the family that "
                "does not think, or one with that switch; or let the template also write the end "
                "of the thoughts there"
            )

    def turns(self, text: str) -> int:
        """How many special tokens a rendered text has."""
        added = self.huggingface.added_tokens_decoder
        return sum(token in added and added[token].special for token in self.read(text))

    def read(self, text: str) -> tuple[int, ...]:
        """Tokens of a rendered template, in which control tokens are obeyed."""
        return tuple(self.huggingface(text, add_special_tokens=False)["input_ids"])

    def render(self, text: str, *, answer: bool, prompt: bool) -> str:
        """A question, or a question and its answer, in the template; one of TEXTS.

        Raises:
          UserError: the template fails on it.
        """
        found = self.rendered[self.system, answer, prompt, text]
        if isinstance(found, dict):
            raise UserError(failure(self.huggingface.name_or_path, found["error"]))
        return found

    def prompt(self, question: str) -> str:
        """A question, up to where the assistant begins to write."""
        return self.render(question, answer=False, prompt=True)

    def dialogues(self, dialogues: Sequence[Sequence[Turn]]) -> list[str]:
        """Dialogues of several turns, up to where the assistant begins to write.

        A system message that the template refuses or leaves out stands before the first question.

        Raises:
          UserError: the template has no place for the turns.
        """
        huggingface, ways = self.huggingface, [self.ways(turns) for turns in dialogues]
        asked = [[messages(tuple(turns)), True] for some in ways for turns in some]
        values = json.dumps(huggingface.special_tokens_map)
        name = huggingface.name_or_path
        texts = iter(run(huggingface.chat_template, values, name, asked) if asked else ())
        found = []
        for turns, some in zip(dialogues, ways, strict=True):
            tried = [next(texts) for _ in some]
            system = turns[0][1] if turns[0][0] == "system" else ""
            whole = [text for text in tried if isinstance(text, str) and system in text]
            if not whole:
                why = tried[-1]["error"] if isinstance(tried[-1], dict) else "a turn is left out"
                roles = ", ".join(role for role, _ in turns)
                raise UserError(failure(name, why, f"the turns {roles}"))
            found.append(whole[0])
        return found

    def ways(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        """How a dialogue may be shown to the template, the best one first."""
        (role, text), *others = turns
        if role != "system":
            return [[("system", "")] * self.system + [*turns]]
        if not others or others[0][0] != "user":
            return [[*turns]]
        merged = [("user", f"{text}\n\n{others[0][1]}"), *others[1:]]
        return [[*turns], *self.ways(merged)]

    def response(self, answer: str) -> str:
        """A question with its answer, begun as the model is asked to answer."""
        asked, whole = self.prompt("a"), self.render(answer, answer=True, prompt=False)
        if whole.startswith(asked):
            return whole
        marked = self.render(MARK, answer=True, prompt=False)
        return asked + answer + marked.split(MARK)[-1]

    def fitted(
        self,
        fill: Callable[[str], str],
        read_in: Callable[[Slot, Sequence[str]], list[tuple[str, list[int]]]],
        controls: Iterable[str],
        before: tuple[int, ...] | None = None,
    ) -> Fit:
        """How a text has to be read so that what surrounds it and its own tokens make the whole.

        Args:
          fill: the template around a text.
          read_in: what is kept of texts in a slot, and its tokens.
          controls: the control tokens; tokenizers read what stands between them by itself.
          before: tokens before the text, where they are known.

        Raises:
          UserError: no way gives the tokens of the template as a whole.
        """
        name = self.huggingface.name_or_path
        parts = fill(MARK).split(MARK)
        if len(parts) != 2:
            raise UserError(f"{name}: the chat template does not show every message once")
        start = parts[0].rstrip(" ")
        context = start[max((start.rfind(c) + len(c) for c in controls if c in start), default=0) :]
        for trimmed in (False, True):
            for glued in dict.fromkeys(("", parts[0][len(start) :])):
                opening = before or self.read(start if glued else parts[0])
                for lead in dict.fromkeys((context, "", "\n")):
                    slot = Slot(lead, glued, trimmed)
                    after = {
                        remainder(self.read(fill(text)), (*opening, *tokens))
                        for text, tokens in read_in(slot, PROBES)
                    }
                    if len(after) == 1 and None not in after:
                        return Fit(opening, slot, *after)
        raise UserError(
            f"{name}: the chat template as a whole gives other tokens than its parts, so that "
            "nothing could be trained as the model reads it; choose a model whose template "
            "separates messages by tokens of their own"
        )


def remainder(whole: tuple[int, ...], start: tuple[int, ...]) -> tuple[int, ...] | None:
    """What follows the start; None where it is not the start."""
    return whole[len(start) :] if whole[: len(start)] == start else None


@functools.lru_cache(16)
def rendered(template: str, values: str, name: str) -> dict[tuple[bool, bool, bool, str], Any]:
    """The template around every text: by whether there is a system message, the text is an answer,
    and the assistant is to begin. What fails is {"error": why}.

    Args:
      template: the template.
      values: what it sees besides, as JSON.
      name: of the model, for the message.

    Raises:
      UserError: it takes longer or more memory than it may.
    """
    keys = [
        (system, answer, not answer, text)
        for system in (False, True) for answer in (False, True) for text in TEXTS
    ]  # fmt: skip
    asked = [[exchange(system, answer, text), prompt] for system, answer, prompt, text in keys]
    return dict(zip(keys, run(template, values, name, asked), strict=True))


def run(
    template: str, values: str, name: str, conversations: Sequence[Any]
) -> list[str | dict[str, str]]:
    """The template around conversations, in a process with limits; {"error": why} where it fails.

    Args:
      template: the template.
      values: what it sees besides, as JSON.
      name: of the model, for the message.
      conversations: each its messages and whether the assistant is to begin.

    Raises:
      UserError: it takes longer or more memory than it may.
    """
    longest = max(sum(len(one["content"]) for one in own) for own, _ in conversations)
    seconds = SECONDS + len(conversations) // 100
    asked = {
        "template": template, "values": json.loads(values), "seconds": seconds, "memory": MEMORY,
        "characters": CHARACTERS + longest, "conversations": conversations,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM)], input=json.dumps(asked), capture_output=True,
        text=True, timeout=60 * seconds, check=False,
    )  # fmt: skip
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise UserError(failure(name, f"it takes longer than {seconds} seconds"))
    if done.returncode:
        raise UserError(
            failure(name, f"it ends with {done.returncode} {done.stderr[-80:].strip()}")
        )
    return json.loads(done.stdout)


def exchange(system: bool, answer: bool, text: str) -> list[dict[str, str]]:
    turns = [("user", "a"), ("assistant", text)] if answer else [("user", text)]
    return messages((*[("system", "")] * system, *turns))


def failure(name: str, reason: str, asked: str = "a single question") -> str:
    return (
        f"{name}: the chat template fails on {asked} ({reason:.200}); choose an "
        "instruction-tuned model"
    )
