"""Text to tokens: the model's own tokenizer and chat template, used the same way everywhere."""

import copy
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from experiment_runs.errors import UserError, brief
from experiment_runs.files import json_object, read_whole
from experiment_runs.foreign import readable
from rlhf_jax.data.dialogues import Turn
from rlhf_jax.pretrained.chat_template import MARK, ChatTemplate, Slot

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Elements of HTML are text; some vocabularies have tokens of their own for them.
HTML = set(re.findall(r"\w+", """
    a b blockquote br caption code div em h1 h2 h3 h4 h5 h6 hr i img li ol p pre s span strong sub
    sup table tbody td tfoot th thead tr u ul
"""))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlainText:
    """Reads what users write, in which no control token is obeyed."""

    backend: Backend
    controls: dict[int, str]
    unknown: str | None  # stands for characters that the model has no token for

    @classmethod
    def of(cls, huggingface: PreTrainedTokenizerFast, controls: dict[int, str]) -> "PlainText":
        backend = copy.deepcopy(huggingface.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([*controls.values()])
        backend.encode_special_tokens = True  # as the text that they are written in
        return cls(backend, controls, huggingface.unk_token)

    def read(self, slot: Slot, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """What is kept of texts that stand in a slot of the template, and its tokens.

        White space at the start of a text that would make one token with the template's is dropped.
        """
        lead = self.backend.encode(slot.lead, add_special_tokens=False).ids
        kept = [text.strip() if slot.trimmed else text for text in texts]
        ids = self.ids([slot.lead + slot.glued + text for text in kept])
        for i, text in enumerate(kept):
            if ids[i][: len(lead)] != lead:
                kept[i] = text.lstrip()
                (ids[i],) = self.ids([slot.lead + slot.glued + kept[i]])
        return [(text, all_[len(lead) :]) for text, all_ in zip(kept, ids, strict=True)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts, none of them a control token."""
        read = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            item.ids if self.controls.keys().isdisjoint(item.ids) else self.spelled(text)
            for text, item in zip(texts, read, strict=True)
        ]

    def spelled(self, text: str) -> list[int]:
        """Tokens of a text some of whose words are control tokens, which are read in two parts."""
        read = self.backend.encode(text, add_special_tokens=False)
        for token, (start, stop) in zip(read.ids, read.offsets, strict=True):
            written = self.controls.get(token)
            if written is None or (written == self.unknown and text[start:stop] != written):
                continue
            if stop - start < 2:
                return [*self.spelled(text[:start]), *self.spelled(text[stop:])]
            return [*self.spelled(text[: start + 1]), *self.spelled(text[start + 1 :])]
        return read.ids


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A prompt becomes prefix + text + suffix; a response becomes text + closing."""

    huggingface: PreTrainedTokenizerFast
    plain: PlainText
    prompt: Slot  # of the user's text
    reply: Slot  # of the assistant's
    prefix: tuple[int, ...]  # the chat template before the user's text
    suffix: tuple[int, ...]  # and after it, up to where the assistant begins to write
    closing: tuple[int, ...]  # after the assistant's text, up to and including the end
    tail: tuple[int, ...]  # and after that, before the next turn
    ends: tuple[int, ...]  # all tokens that end a response; first the one of the template
    pad: int  # never one of them: a padded end would teach the model never to stop

    @classmethod
    def of(
        cls,
        huggingface: PreTrainedTokenizerFast,
        *,
        ends: Sequence[int] = (),
        embeddings: int | None = None,
    ) -> "Tokenizer":
        """Wraps a transformers tokenizer with a chat template.

        Args:
          huggingface: the tokenizer.
          ends: tokens that end a response beside the one that the template writes.
          embeddings: how many tokens the model knows; those beyond are never used.

        Raises:
          UserError: there is no chat template, no end token, or no token left to pad with; an
            end token is a text; the template as a whole has other tokens than its parts; the
            vocabulary is not the model's.
        """
        name = huggingface.name_or_path
        huggingface.chat_template = chosen_template(huggingface.chat_template, name)
        if not huggingface.chat_template or huggingface.eos_token_id is None:
            raise UserError(
                f"{name}: tokenizer_config.json lacks chat_template or "
                "eos_token; choose an instruction-tuned model"
            )
        embeddings = len(huggingface) if embeddings is None else embeddings
        template = ChatTemplate(huggingface)
        conversation = template.read(template.response("a"))
        check_vocabulary(huggingface, used=conversation, embeddings=embeddings)
        controls = control_tokens(huggingface, used=conversation, embeddings=embeddings)
        plain, written = PlainText.of(huggingface, controls), controls.values()
        prompt = template.fitted(template.prompt, plain.read, written)
        begun = (*prompt.before, *plain.read(prompt.slot, ["a"])[0][1], *prompt.after)
        reply = template.fitted(template.response, plain.read, written, before=begun)
        last = next((i for i, token in enumerate(reply.after) if token in controls), None)
        closing = (huggingface.eos_token_id,) if last is None else reply.after[: last + 1]
        tail = () if last is None else reply.after[last + 1 :]
        ending = {*controls, huggingface.eos_token_id}
        if words := [token for token in ends if token < embeddings and token not in ending]:
            raise UserError(
                f"{name}: eos_token_id {words[0]} of the model is the text "
                f"{huggingface.decode([words[0]])!r}; give the token that ends a reply"
            )
        every = dict.fromkeys((closing[-1], *ends, huggingface.eos_token_id))
        used = {*prompt.before, *prompt.after, *closing, *tail}
        ends = tuple(token for token in every if token < embeddings)
        known = [token for token in controls if token < embeddings]
        return cls(
            huggingface, plain, prompt.slot, reply.slot, prompt.before, prompt.after, closing,
            tail, ends, choose_pad(huggingface, known, used={*used, *ends}),
        )  # fmt: skip

    @classmethod
    def from_folder(cls, path: Path, *, embeddings: int) -> "Tokenizer":
        """The tokenizer of a model's folder, exactly as its tokenizer.json describes it.

        Raises:
          UserError: a file is missing or broken, or the tokenizer cannot be used; see `of`.
        """
        if not (path / "tokenizer.json").exists():
            raise UserError(
                f"{path}/tokenizer.json: missing; only fast tokenizers are supported, and "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it"
            )
        ends = generation_ends(path)
        with readable(path / "tokenizer.json", "a tokenizer with its other files"):
            # The general class: those of single families build the tokenizer anew from vocabulary
            # and merges, with their own rules for splitting words in place of the file's.
            huggingface = PreTrainedTokenizerFast.from_pretrained(path)
            made = cls.of(huggingface, ends=ends, embeddings=embeddings)
            made.decode_exact([*range(made.vocab_size)])  # some broken ones fail only then
        return made

    @property
    def end(self) -> int:
        """Ends a response, as the template writes it."""
        return self.ends[0]

    @functools.cached_property
    def vocab_size(self) -> int:
        return len(self.huggingface)

    @property
    def template_length(self) -> int:
        """Tokens that the template adds to a prompt."""
        return len(self.prefix) + len(self.suffix)

    def encode(self, texts: Sequence[str], *, reply: bool = False) -> list[list[int]]:
        """Tokens of each prompt or reply, without template; never a control token."""
        read = self.plain.read(self.reply if reply else self.prompt, texts)
        return [tokens for _, tokens in read]

    @functools.cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.huggingface)

    @functools.cached_property
    def around_reply(self) -> tuple[str, str]:
        """What the template writes between a prompt and its reply, and after it up to the end."""
        before, after = self.template.response(MARK).split(MARK)
        end = self.decode_exact([self.end])
        closing = after[: after.index(end)] if end in after else ""
        return before.removeprefix(self.template.prompt("a")), closing + end

    def encode_dialogues(self, dialogues: Sequence[Sequence[Turn]]) -> list[tuple[int, ...]]:
        """Tokens of dialogues in the template, up to where the assistant begins to write.

        Raises:
          UserError: a turn has a control token in it, or the template has no place for the turns.
        """
        for role, text in (turn for turns in dialogues for turn in turns):
            if written := [token for token in self.plain.controls.values() if token in text]:
                raise UserError(
                    f"a turn of the {role}'s holds {written[0]!r}, which only the chat template "
                    f"may write: {text!r:.80}; take it out"
                )
        return [*map(self.template.read, self.template.dialogues(dialogues))]

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, "time"]) -> str:
        """The text of tokens; end tokens and padding show as nothing."""
        kept = [int(token) for token in tokens if token not in (*self.ends, self.pad)]
        return self.huggingface.decode(kept, clean_up_tokenization_spaces=False)

    def decode_exact(self, tokens: Sequence[int] | Int[np.ndarray, "time"]) -> str:
        """The text of tokens with every special token written out."""
        return self.huggingface.decode(list(tokens), clean_up_tokenization_spaces=False)


def chosen_template(template: str | dict[str, str] | None, name: str) -> str | None:
    """The template of conversations, where a model has one by name for every purpose."""
    if not isinstance(template, dict):
        return template
    if "default" not in template and len(template) > 1:
        raise UserError(
            f"{name}: chat_template has the variants {sorted(template)} and none is called "
            "'default'; rename one of them"
        )
    return template.get("default", next(iter(template.values()), None))


def generation_ends(path: Path) -> list[int]:
    """Tokens that end a response by a folder's generation_config.json, else its config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        if file.exists():
            try:
                ends = json_object(read_whole(file)).get("eos_token_id")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: not a JSON object ({error}); write it anew") from None
            if ends is not None:
                ends = ends if isinstance(ends, list) else [ends]
                if any(type(end) is not int or end < 0 for end in ends):
                    raise UserError(
                        f"{file}: eos_token_id is {brief(ends)}; give numbers of tokens, 0 or more"
                    )
                return ends
    return []


def control_tokens(
    huggingface: PreTrainedTokenizerFast, *, used: Sequence[int], embeddings: int
) -> dict[int, str]:
    """Tokens that only the template may write: special ones, markers, and those it uses itself.

    Added tokens that are white space, words or elements of HTML are text like any other.

    Args:
      huggingface: the tokenizer.
      used: tokens of a conversation in the template.
      embeddings: how many tokens the model knows.
    """
    special = {*huggingface.all_special_ids}
    declared = getattr(huggingface, "chat_control_tokens", None) or ()
    controls = {}
    for number, token in huggingface.added_tokens_decoder.items():
        text = token.content.strip()
        marker = text[:1] in ("<", "[") and text[-1:] in (">", "]")
        always = number in special or token.special or number >= embeddings
        if always or (
            text.strip("\N{LOWER ONE EIGHTH BLOCK}")
            and (number in used or text in declared or (marker and text.strip("</>") not in HTML))
        ):
            controls[number] = token.content
    return controls


def check_vocabulary(
    huggingface: PreTrainedTokenizerFast, *, used: Sequence[int], embeddings: int
) -> None:
    """Refuses a tokenizer that writes tokens which the model has no embedding of.

    Added tokens beyond the embeddings do no harm as long as nothing uses them.
    """
    words = huggingface.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    used = {*used, max(words, default=0)}
    if beyond := sorted(token for token in used if token >= embeddings):
        raise UserError(
            f"{huggingface.name_or_path}: the tokenizer writes tokens {beyond}, the model has "
            f"{embeddings} embeddings; use the tokenizer that belongs to it"
        )


def choose_pad(
    huggingface: PreTrainedTokenizerFast, controls: Sequence[int], used: set[int]
) -> int:
    """The tokenizer's pad token, or another control token where that one has a meaning."""
    for token in (huggingface.pad_token_id, huggingface.unk_token_id, *sorted(controls)):
        if token in controls and token not in used:
            return token
    raise UserError(
        f"{huggingface.name_or_path}: no special token to pad with that is not in use; "
        "add a pad_token other than eos_token to tokenizer_config.json"
    )


def byte_tokenizer() -> Tokenizer:
    """256 bytes and four special tokens, for tests and the `tiny` profile."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    return Tokenizer.of(
        byte_level(vocabulary, [], special, end="<|im_end|>", pad="<|pad|>", template=CHATML)
    )


def byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    special: list[str],
    *,
    end: str,
    pad: str | None,
    template: str,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from its parts."""
    backend = Backend(BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=pad,
        unk_token=special[0] if pad is None else special[-1],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
