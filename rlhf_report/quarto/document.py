"""An executed notebook as a pandoc document: captions, numbers, references, callouts.

Pandoc reads the Markdown, sets citations, mathematics and tables and writes both formats; this
module does what Quarto adds to pandoc. The tree is pandoc's own JSON, plain lists and dicts.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pypandoc
from nbformat import NotebookNode

from experiment_runs.errors import UserError, first_line
from experiment_runs.files import json_object, read_whole
from rlhf_report.quarto.cells import cell_markdown, unescape_shortcodes
from rlhf_report.quarto.notebook import Source, file_lines

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
CALLOUTS = [[f"callout-{kind}"] for kind in ("note", "tip", "important", "caution", "warning")]

Node = dict[str, Any]


def pandoc(text: str, *arguments: str) -> str:
    """What pandoc writes for `text`."""
    command = [pypandoc.get_pandoc_path(), *arguments]
    # In the locale C it could not open a file whose path is not ASCII.
    locale = {"LC_ALL": "C.UTF-8"} if sys.platform == "linux" else {}
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, env=os.environ | locale
    )
    if done.returncode:
        raise UserError(f"pandoc: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def read_markdown(text: str) -> Node:
    tree = pandoc(text, "-f", "markdown-implicit_header_references", "-t", "json")
    try:
        return json_object(tree.encode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"this document cannot be set: {first_line(error)}") from None


def compose(
    notebook: NotebookNode, source: Source, bibliography: Path | None, folder: Path
) -> tuple[Node, dict[str, str]]:
    """The document of an executed notebook, and what each label is called ("Figure 1").

    Images are written into `folder`. In a document with front matter, which is complete, a
    reference to nothing is an error; a chapter alone prints it with a question mark.
    """
    text = "\n\n".join(
        unescape_shortcodes(cell.source)
        if cell.cell_type == "markdown"
        else cell_markdown(cell, index, folder)
        for index, cell in enumerate(notebook.cells)
    )
    tree = read_markdown(text)
    numbering = Numbering(notebook, source)
    blocks = walk(tree["blocks"], numbering.visit)
    keys = bibliography_keys(bibliography)
    blocks = walk(blocks, lambda node: reference(node, numbering.names, keys, source))
    for image in find(blocks, "Image"):
        fetch(image, source, folder)
    return tree | {"blocks": blocks}, numbering.names


def walk(node: Any, visit: Callable[[Node], Any]) -> Any:
    """The tree with every element replaced by what `visit` makes of it, innermost first.

    `visit` returns None to keep an element, another element, or a list of them to splice in.
    """
    if isinstance(node, dict):
        return {key: walk(value, visit) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    walked = []
    for child in node:
        child = walk(child, visit)
        made = visit(child) if isinstance(child, dict) and "t" in child else None
        walked += [child] if made is None else made if isinstance(made, list) else [made]
    return walked


# Figures, tables, numbers, references ----------------------------------------------------------


class Numbering:
    """Visits a document in order: builds figures and tables, and numbers all that has a label."""

    def __init__(self, notebook: NotebookNode, source: Source):
        self.cells, self.source = notebook.cells, source
        self.names: dict[str, str] = {}
        self.counts = {"fig": 0, "tbl": 0, "eq": 0}
        self.sections: list[int] = []

    def visit(self, node: Node) -> Node | list[Node] | None:
        if node["t"] == "Header":
            self.header(*node["c"][:2])
        elif node["t"] == "Div":
            return self.cell(node) if is_div(node, "cell-float") else self.div(node)
        elif node["t"] in ("Figure", "Table") and node["c"][0][0][:4] in ("fig-", "tbl-"):
            self.caption(node)
        elif node["t"] == "Para":
            return self.equation(node["c"])
        elif node["t"] == "Span" and node["c"][0][1]:
            token = node["c"][0][1][0]
            raise UserError(f"{self.source.place(token)}: unknown span {token!r}")
        elif node["t"] in ("RawBlock", "RawInline") and not node["c"][1].startswith("<!--"):
            kind, text = node["c"]
            place = self.source.place(text.split("\n")[0])
            raise UserError(f"{place}: raw {kind} is not shown in both outputs: {text[:60]}")
        return None

    def name(self, label: str, number: str = "") -> str:
        """Record the number of `label`, the next one of its kind where none is given."""
        if label in self.names:
            raise UserError(f"{self.source.place(label)}: the label {label!r} is used twice")
        kind = label.split("-")[0]
        if not number:
            self.counts[kind] += 1
            number = str(self.counts[kind])
        self.names[label] = f"{KINDS[kind]}\u00a0{number}"
        return number

    def header(self, level: int, attributes: list) -> None:
        label, classes, _ = attributes
        if "unnumbered" not in classes:
            sections = (self.sections + [0] * level)[:level]
            self.sections = [*sections[:-1], sections[-1] + 1]
            if label.startswith("sec-"):
                self.name(label, ".".join(map(str, self.sections)))
        elif label.startswith("sec-"):
            raise UserError(f"{self.source.place(label)}: {label} is unnumbered, so has no number")

    def cell(self, node: Node) -> list[Node]:
        """One figure or one table, with its caption, from the output of a labelled cell."""
        (_, _, pairs), content = node["c"]
        metadata = self.cells[int(dict(pairs)["index"])].metadata
        options, place = metadata.options, metadata.place
        captions = [plain(x) for x in content if is_div(x, "cell-caption")]
        content = [x for x in content if not is_div(x, "cell-caption")]
        if options["label"].startswith("tbl-"):
            tables = [x for x in content if x["t"] == "Table"]
            if content and all(x["t"] == "Para" for x in content):  # why there is no table
                said = element("Figure", [[options["label"], [], []], captions[0], content])
                self.caption(said)
                caption = [element("Para", x["c"]) for x in captions[0][1]]
                return [element("Div", [said["c"][0], [*caption, *content]])]
            if len(tables) != 1:
                raise UserError(f"{place}: {options['label']} needs one table, got {len(tables)}")
            tables[0]["c"][:2] = [[options["label"], [], []], captions[0]]
            self.caption(tables[0])
            return content
        drawn = [x for x in content if find(x, "Image")]
        images = find(drawn, "Image")
        if not images:
            raise UserError(f"{place}: {options['label']} needs a figure, and the cell drew none")
        made = self.figure(images, captions, options, place)
        return [*(x for x in content if x not in drawn), made]

    def figure(self, images: list[Node], captions: list, options: Node, place: str) -> Node:
        """A figure of one image, or of several in columns, with captions of their own."""
        alts, label = options.get("fig-alt", words(captions[0])), options["label"]
        alts = alts if isinstance(alts, list) else [alts] * len(images)
        if len(alts) != len(images) or len(captions[1:]) not in (0, len(images)):
            raise UserError(f"{place}: {len(images)} images need as many fig-alt and fig-subcap")
        for image, alt in zip(images, alts, strict=True):
            image["c"][1] = [string(alt)]
        panels = [element("Plain", [image]) for image in images]
        whole = element("Figure", [[label, [], []], captions[0], panels])
        self.caption(whole)
        if captions[1:]:
            panels = [
                element("Figure", [[f"{label}-{k}", [], []], caption, [panel]])
                for k, (panel, caption) in enumerate(zip(panels, captions[1:], strict=True), 1)
            ]
            for letter, panel in zip("abcdefghijklmnopqrstuvwxyz", panels, strict=False):
                self.names[panel["c"][0][0]] = self.names[label] + letter
                prefix(panel, f"({letter})")
        if len(panels) > 1:
            columns = [["columns", str(options.get("layout-ncol", 1))]]
            whole["c"][2] = [element("Div", [["", ["panels"], columns], panels])]
        return whole

    def caption(self, node: Node) -> None:
        self.name(node["c"][0][0])
        prefix(node, self.names[node["c"][0][0]] + ":")

    def equation(self, inlines: list[Node]) -> list[Node] | None:
        """Display mathematics followed by {#eq-...} becomes a block of its own, with a number."""
        for k, node in enumerate(inlines):
            if node["t"] == "Math" and node["c"][0]["t"] == "DisplayMath":
                rest = [x for x in inlines[k + 1 : k + 3] if x["t"] not in ("Space", "SoftBreak")]
                match = re.fullmatch(r"\{#(eq-[\w-]+)\}", rest[0].get("c", "") if rest else "")
                if match:
                    number = ["number", self.name(match[1])]
                    content = [element("Plain", [node])]
                    block = element("Div", [[match[1], ["equation"], [number]], content])
                    before, after = inlines[:k], inlines[inlines.index(rest[0]) + 1 :]
                    return [
                        *([element("Para", before)] if before else []),
                        block,
                        *((self.equation(after) or [element("Para", after)]) if after else []),
                    ]
        return None

    def div(self, node: Node) -> Node | None:
        """Divs mean something in Quarto: callouts and the list of references are known here."""
        (label, classes, pairs), content = node["c"]
        if label == "refs" or classes == ["cell-caption"]:
            return None
        if classes not in CALLOUTS or not {key for key, _ in pairs} <= {"title"}:
            token = " ".join([*classes, label, *(key for key, _ in pairs)]).split()[0]
            raise UserError(
                f"{self.source.place(token)}: unknown div {token!r}; known are #refs and "
                f"{', '.join(kind for (kind,) in CALLOUTS)}, with a title and nothing else"
            )
        kind = classes[0].removeprefix("callout-")
        title = read_markdown(dict(pairs).get("title", kind.title()))["blocks"][0]["c"]
        heading = element("Div", [["", ["callout-title"], []], [element("Plain", title)]])
        return element("Div", [[label, ["callout", *classes], []], [heading, *content]])


def reference(node: Node, names: dict[str, str], keys: set[str], source: Source) -> Any:
    """A link with the name of a figure, table, equation or section where the text cites one."""
    if node["t"] != "Cite":
        return None
    citations, made = node["c"][0], []
    labels = [x["citationId"] for x in citations if x["citationId"].split("-")[0] in KINDS]
    for citation in citations:
        label = citation["citationId"]
        known = names if label in labels else keys
        if label not in known and (source.front_matter or known is keys):
            raise UserError(f"{source.place('@' + label)}: @{label} refers to nothing")
    if not labels:
        return None
    if len(labels) < len(citations):
        raise UserError(f"{source.place('@' + labels[0])}: references and citations are mixed")
    for citation in citations:
        label, before = citation["citationId"], citation["citationPrefix"]
        name = names.get(label, f"?@{label}")
        if before or citation["citationMode"]["t"] == "SuppressAuthor":
            name = name.split("\u00a0")[-1]
        text = [*before, *([string("\u00a0")] if before else []), string(name)]
        link = element("Link", [["", ["quarto-xref"], []], text, [f"#{label}", ""]])
        made += [string(","), element("Space")] if made else []
        made += [link] if label in names else [element("Strong", text)]
        made += citation["citationSuffix"]
    return made


def fetch(image: Node, source: Source, folder: Path) -> None:
    """Bring an image that the text names into `folder`, and its alternative text to its place."""
    attributes, _, target = image["c"]
    pairs = dict(attributes[2])
    if "fig-alt" in pairs:
        image["c"][1] = [string(pairs.pop("fig-alt"))]
        attributes[2] = [list(pair) for pair in pairs.items()]
    if not (folder / target[0]).is_file():
        path = source.path.parent / target[0]
        if not path.is_file():
            raise UserError(f"{source.place(target[0])}: there is no image {path}")
        target[0] = target[0].replace("/", "-")
        (folder / target[0]).write_bytes(read_whole(path))


def bibliography_keys(path: Path | None) -> set[str]:
    if path is None:
        return set()
    if not path.is_file():
        raise UserError(f"{path}: this bibliography, named in _quarto.yml, does not exist")
    text = "\n".join(line.text for line in file_lines(path))
    return set(re.findall(r"^\s*@\w+\s*\{\s*([^,\s]+)", text, re.MULTILINE))


# Parts of pandoc's tree ------------------------------------------------------------------------


def element(kind: str, content: Any = None) -> Node:
    return {"t": kind} if content is None else {"t": kind, "c": content}


def string(text: str) -> Node:
    return element("Str", text)


def is_div(node: Node, name: str) -> bool:
    return node["t"] == "Div" and name in node["c"][0][1]


def find(tree: Any, kind: str) -> list[Node]:
    """All elements of a kind, in order."""
    if isinstance(tree, list):
        return [node for child in tree for node in find(child, kind)]
    if not isinstance(tree, dict):
        return []
    return [tree] * (tree.get("t") == kind) + find(tree.get("c"), kind)


def words(tree: Any) -> str:
    """The text of a caption without its markup."""
    if isinstance(tree, list):
        return "".join(map(words, tree))
    if not isinstance(tree, dict) or "t" not in tree:  # an attribute, a citation's record
        return ""
    if tree["t"] in ("Space", "SoftBreak"):
        return " "
    content = tree.get("c", "")
    if tree["t"] in ("Code", "Math"):
        return content[1]
    return content if isinstance(content, str) else words(content)


def plain(div: Node) -> list:
    """The content of a caption's div as pandoc's Caption."""
    blocks = [element("Plain", x["c"]) if x["t"] == "Para" else x for x in div["c"][1]]
    return [None, blocks]


def prefix(node: Node, text: str) -> None:
    """Put the number before the caption of a figure or table."""
    blocks = node["c"][1][1] or [element("Plain", [])]
    blocks[0]["c"] = [string(text), element("Space"), *blocks[0]["c"]]
    node["c"][1][1] = blocks
