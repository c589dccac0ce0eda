"""Dialogues as data sets write them: lists of messages, or a text with a mark before every turn."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiment_runs.errors import UserError, brief

Turn = tuple[str, str]  # (role, text)
Conversation = (
    str | tuple[Turn, ...]
)  # a single question, or a dialogue that ends with the user's turn

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
LABELS = {"user": "Human", "assistant": "Assistant"}
MARKED = re.compile(r"\s*(Human|Assistant): ?")
MARK = re.compile(r"(?:\A\s*|\n\r?\n)(Human|Assistant):")
LINE_MARK = re.compile(r"(?:\A|\n)(prompter|assistant): ")  # of OASST's paths in one text
POST = "info"  # column of what summarize_from_feedback's summaries are of
SYSTEMS = ("system", "system_prompt")  # columns of a system message
DIALOGUES = ("messages", "conversations", "conversation")  # of dialogues, which may begin with one
BESIDE = ("input", "context")  # columns of what an instruction or a question is about
# Whole dialogues in one text: a printed list, the marks of other chat formats, or names of speakers
# that no empty line stands before, or that HH-RLHF does not have.
WRITTEN = re.compile(
    r"\A\s*\[\s*[\"'{]|<\|im_(?:start|end)\|>|<\|(?:user|assistant|start_header_id)\|>"
    r"|<start_of_turn>|\[/?INST\]|###\s*(?:Human|User|Instruction|Assistant|Response)\b"
    r"|\A\s*(?:Human:(?:(?!\n\s*\n)[\s\S])*?|User:[\s\S]*?\n?)\n[ \t]*(?:Assistant|AI|Bot):"
)


def is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def turns(value: Any, where: str) -> list[Turn]:
    """The turns of a dialogue: a list of messages, or text as HH-RLHF writes it.

    Messages are {"role", "content"} or {"from", "value"}, or two of them {"input", "output"}; a
    content may be a list of text parts, and a message alone is a list of one. A text without marks
    is one turn of the user's, and so is a record of `record_text`. An assistant's turn that is
    still empty at the end is none.

    Raises:
      UserError: it is neither.
    """
    value = record_text(value) or value
    if isinstance(value, str):
        of_lines = value.startswith("prompter: ")
        if not of_lines and not MARKED.match(value):
            return [("user", value.strip())]
        _, *parts = (LINE_MARK if of_lines else MARK).split(value)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        found = [(ROLES[mark.lower()], text.strip()) for mark, text in pairs]
    elif is_messages(value) or isinstance(value, dict):
        items = [value] if isinstance(value, dict) else value
        found = [message(part, where) for item in items for part in parts_of(item)]
    else:
        raise UserError(
            f"{where} is {value!r:.80}; it must be a text or a list of messages with role and "
            "content; correct or remove the row"
        )
    return found[:-1] if found[-1:] == [("assistant", "")] else found


def record_text(value: Any) -> str | None:
    """The text of a record that asks something: WebGPT's question, or a post or an article to
    summarize, in the words of Stiennon et al. (2020)."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("full_text"), str):
        return value["full_text"]
    if isinstance(article := value.get("article"), str) and article.strip():
        return f"Article:\n\n{article}\n\nTL;DR:"
    if isinstance(post := value.get("post"), str) and post.strip():
        heads = [f"SUBREDDIT: r/{value['subreddit']}"] * bool(value.get("subreddit"))
        heads += [f"TITLE: {value['title']}"] * bool(value.get("title"))
        return "\n\n".join([*heads, f"POST: {post}", "TL;DR:"])
    return None


def question_column(frame: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of the names that a frame has as column, or that of its posts."""
    if found := next((name for name in names if name in frame), None):
        return found
    return POST if POST in frame and frame[POST].map(record_text).notna().any() else None


def parts_of(item: Any) -> list[Any]:
    """The messages of an item of a dialogue: it, or the two of {"input", "output"} (Capybara)."""
    if not (isinstance(item, dict) and {"input", "output"} <= {*item}):
        return [item]
    roles = {"input": "user", "output": "assistant"}
    return [{"role": role, "content": item[name]} for name, role in roles.items()]


def message(item: Any, where: str) -> Turn:
    role, content = None, None
    if isinstance(item, dict):
        role = ROLES.get(str(item.get("role", item.get("from"))).lower())
        content = item.get("content", item.get("value"))
        if is_messages(content):  # text parts, as of multimodal models
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "\n".join(parts) if all(isinstance(p, str) for p in parts) else None
    if role is None or not isinstance(content, str):
        raise UserError(
            f"{where} holds the message {item!r:.80}; a message is "
            '{"role": "system", "user" or "assistant", "content": a text}; correct or remove '
            "the row"
        )
    return role, content.strip()


def check_plain(where: str, columns: Mapping[str, Iterable[Any]]) -> None:
    """Refuses columns of texts most of which are dialogues, written as none that is read.

    Raises:
      UserError: names column and mark.
    """
    for column, values in columns.items():
        texts = [value for value in values if isinstance(value, str)]
        marks = [found.group() for text in texts if (found := WRITTEN.search(text))]
        if len(marks) > len(texts) / 2:
            raise UserError(
                f"{where}: {marks[0]!r} in {len(marks)} of {len(texts)} texts of '{column}': "
                "dialogues in a chat format, or printed lists. Save them as lists of messages with "
                "role and content, in JSON or Parquet"
            )


def with_context(asked: list[Turn], row: Mapping[str, Any], column: str) -> list[Turn]:
    """An instruction or a question of a row with what it is about, which stands in a column beside
    it (Alpaca, Dolly, SQuAD)."""
    texts = [row.get(name) for name in BESIDE if column in ("instruction", "question")]
    more = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return [("user", "\n\n".join([question(asked), *more]).strip())] if more else asked


def with_system(asked: list[Turn], row: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns behind the system message of their row, unless they have one.

    It stands in a column of its own, or at the start of the whole dialogue in a column beside the
    prompt (no_robots). A prompt that begins with its text has it already.
    """
    texts = [row[name].strip() for name in SYSTEMS if isinstance(row.get(name), str)]
    for name in DIALOGUES:
        for item in row[name][:1] if is_messages(row.get(name)) else ():
            if isinstance(item, dict) and "system" in (item.get("role"), item.get("from")):
                texts.append(message(item, f"{where}: '{name}'")[1])
    system = next(filter(None, texts), "")
    if not system or not asked or asked[0][0] == "system" or asked[0][1].startswith(system):
        return asked
    return [("system", system), *asked]


def conversation_of(asked: Sequence[Turn]) -> Conversation:
    """What is to be answered: a text where it is a single question, else all turns that say
    something, for the chat template."""
    kept = tuple((role, text) for role, text in asked if text)
    return kept[0][1] if [role for role, _ in kept] == ["user"] else kept


def conversation(value: Any, where: str) -> Conversation:
    """A prompt as somebody gives it: a text, which stays as it is but for one that HH-RLHF's marks
    make a dialogue, or messages.

    Raises:
      UserError: it is empty, or does not end with the user's message.
    """
    is_question = isinstance(value, str) and not MARKED.match(value)
    asked = [("user", value)] if is_question else turns(value, where)
    if not asked or asked[-1][0] != "user" or not asked[-1][1].strip():
        raise UserError(f"{where} is {value!r:.80}; it must end with a message of the user's")
    return value if is_question else conversation_of(asked)


def conversations(prompts: Iterable[Any]) -> list[Conversation]:
    """Prompts as the chat template gets them: texts, or the turns of dialogues.

    Raises:
      UserError: they are one text or a frame; a prompt is empty, or does not end with the user's
        message.
    """
    if isinstance(prompts, str | Mapping | pd.DataFrame):
        raise UserError(f"prompts is {brief(prompts)}; give a list of prompts, or a column of them")
    return [conversation(given, f"prompt {number}") for number, given in enumerate(prompts, 1)]


def messages(prompt: Conversation) -> str | list[dict[str, str]]:
    """A prompt as functions of prompts get it: a text, or the messages of a dialogue."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": role, "content": text} for role, text in prompt]


def shown(prompt: Conversation) -> str:
    """A prompt as one text, for logs and readers."""
    return prompt if isinstance(prompt, str) else question(prompt)


def identifying(item: Any) -> list[Any]:
    """The values of a post or a prompt that tell it from others: its turns only where it has
    several, so that runs on single questions keep the identity that they had without the field."""
    values = dataclasses.asdict(item)
    return [value for name, value in values.items() if name != "turns" or value]


def question(asked: Sequence[Turn]) -> str:
    """What the turns before an answer ask, as one text.

    A single question stays as it is. The turns of a longer dialogue are written one after the
    other with the speaker before each, behind the system message, if there is one.
    """
    system = [text for role, text in asked if role == "system" and text]
    return "\n\n".join(system + spoken(asked))


def spoken(asked: Sequence[Turn]) -> list[str]:
    """The turns of user and assistant as text, with the speaker where there are several."""
    kept = [(role, text) for role, text in asked if role != "system" and text]
    if len(kept) == 1:
        return [kept[0][1]]
    return [f"{LABELS[role]}: {text}" for role, text in kept]


def first_question(dialogue: Sequence[Turn]) -> list[Turn]:
    """All turns of a dialogue that ends with the user, else those before its first answer."""
    if not dialogue or dialogue[-1][0] == "user":
        return list(dialogue)
    roles = [role for role, _ in dialogue]
    return list(dialogue[: roles.index("assistant")]) if "assistant" in roles else []
