"""Renders a chat template in a process of its own, with limits: `chat_template` starts it.

A template may loop or grow without end, also within one operation that nothing can interrupt. Reads
one JSON object from standard input, {"template", "values", "conversations": [[messages, whether the
assistant is to begin], ...], "seconds", "memory", "characters"}, and prints a list: for each
conversation its text, or {"error": what went wrong}. The template sees what transformers shows it,
but always the same day, with which the tokens of a run would change otherwise.
"""

import datetime
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant wrote, for losses; here it is text like any."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Without names that could lead out of the sandbox."""

    def __init__(*args, **kwargs):  # noqa: N805 - a template may name a value "self"
        self, *args = args
        values = dict(*args, **kwargs)
        for name in values:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed")


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": refuse, "strftime_now": datetime.date(2024, 7, 26).strftime,
        "namespace": Namespace, "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }  # fmt: skip
    return made


def render(asked: Mapping[str, Any]) -> list[str | dict[str, str]]:
    """The text of every conversation, or what went wrong."""
    try:
        template = environment().from_string(asked["template"])
    except Exception as error:  # of jinja2, or Python's own of what jinja2 makes of it
        return [said(error)] * len(asked["conversations"])
    found: list[str | dict[str, str]] = []
    for messages, prompt in asked["conversations"]:
        try:
            text = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt,
                enable_thinking=False, **asked["values"],
            )  # fmt: skip
            if len(text) > asked["characters"]:
                raise ValueError(f"it writes {len(text):,} characters")
            found.append(text)
        except MemoryError as error:
            return [said(error)] * len(asked["conversations"])
        except Exception as error:  # whatever a template does
            found.append(said(error))
    return found


def said(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    seconds, memory = asked["seconds"], asked["memory"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if sys.platform == "linux":  # others do not count addresses
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps(render(asked)))
