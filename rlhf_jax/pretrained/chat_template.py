"""A model's chat template: what stands around a prompt and a reply, as text and as tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError
from experiment_runs.foreign import within

MARK = "\N{BLACK SQUARE}mark\N{BLACK SQUARE}"
# Some templates write today's date, with which the tokens of a run would change from day to day.
LONGEST_RENDERING = 1.0  # seconds; a template may loop without end
DATED = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
# Texts at whose edges tokenizers read template and text together.
PROBES = (
    "word", "Two words", "42 is", "(x)", "Ends.", "ends)", "1", "é", "東京", "🙂", "a\n\nb",
    "  two spaces before", "\nline", "\n\n1. item", "after ", "after\n", "tab\t", "a\n\n\n", ".\n",
)  # fmt: skip


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
        self.system: list[dict[str, str]] = []
        without = self.prompt(MARK)
        self.system = [{"role": "system", "content": ""}]
        try:
            with_system = self.prompt(MARK)
        except UserError:
            with_system = None
        if with_system is None or (
            len(with_system) > len(without) and self.turns(with_system) <= self.turns(without)
        ):
            self.system = []

    def turns(self, text: str) -> int:
        """How many special tokens a rendered text has."""
        added = self.huggingface.added_tokens_decoder
        return sum(token in added and added[token].special for token in self.read(text))

    def read(self, text: str) -> tuple[int, ...]:
        """Tokens of a rendered template, in which control tokens are obeyed."""
        return tuple(self.huggingface(text, add_special_tokens=False)["input_ids"])

    def render(self, turns: Sequence[tuple[str, str]], *, prompt: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            with within(LONGEST_RENDERING, "the template"):
                return self.huggingface.apply_chat_template(
                    self.system + messages, chat_template=DATED + self.huggingface.chat_template,
                    tokenize=False, add_generation_prompt=prompt, enable_thinking=False,
                )  # fmt: skip
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                RecursionError, MemoryError, TimeoutError) as error:  # fmt: skip
            raise UserError(
                f"{self.huggingface.name_or_path}: the chat template fails on a single question "
                f"({error}); choose an instruction-tuned model"
            ) from None

    def prompt(self, question: str) -> str:
        """A question, up to where the assistant begins to write."""
        return self.render([("user", question)], prompt=True)

    def response(self, answer: str) -> str:
        """A question with its answer, begun as the model is asked to answer."""
        asked, turns = self.prompt("a"), [("user", "a"), ("assistant", answer)]
        whole = self.render(turns, prompt=False)
        if whole.startswith(asked):
            return whole
        marked = self.render([("user", "a"), ("assistant", MARK)], prompt=False)
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
