"""What an executed code cell shows, as Markdown for pandoc: its code, text, tables and images."""

import base64
import re
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from experiment_runs.errors import UserError
from rlhf_report.quarto.notebook import SHORTCODE

# Characters that are not allowed in a page, not seen, or that reorder what stands around them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
PLOT_REPR = re.compile(r"[<\[({].*[>\])}]|Text\(.*\)", re.DOTALL)
LARGEST_SVG = 150_000  # characters; a drawing of more lines than this is kept as pixels


def cell_markdown(cell: NotebookNode, index: int, folder: Path) -> str:
    """Source (where shown) and outputs of a code cell; images are written into `folder`."""
    options = cell.metadata.options
    if not options.get("include", True):
        return ""
    parts = []
    if options["echo"]:
        code = "\n".join(x for x in cell.source.split("\n") if not x.startswith("#|")).strip("\n")
        summary = options.get("code-summary", "Code") if options["code-fold"] else ""
        summary = summary.replace('"', '\\"')
        parts.append(fenced(code, f'{{.python .cell-code code-summary="{summary}"}}'))
    if options.get("output", True):
        drawn = any("image/png" in x.get("data", {}) for x in cell.outputs)
        outputs = [x for x in cell.outputs if not (drawn and is_plotting_value(x))]
        shown = [output_markdown(x, cell, folder / f"{index}-{k}") for k, x in enumerate(outputs)]
    else:
        shown = []
    if options.get("label", "").startswith(("fig-", "tbl-")):
        captions = [options.get("fig-cap") or options["tbl-cap"], *options.get("fig-subcap", [])]
        captions = [f":::: {{.cell-caption}}\n{caption}\n::::" for caption in captions]
        shown = [f'::: {{.cell-float index="{index}"}}', *captions, *shown, ":::"]
    return "\n\n".join([*parts, *shown])


def is_plotting_value(output: dict[str, Any]) -> bool:
    """Whether this is the value of a plotting call, which Quarto hides beside a figure."""
    text = output.get("data", {}).get("text/plain", "")
    return output["output_type"] == "execute_result" and bool(PLOT_REPR.fullmatch(text.strip()))


def output_markdown(output: dict[str, Any], cell: NotebookNode, path: Path) -> str:
    """One output: text is verbatim, Markdown is Markdown, an image becomes a file at `path`."""
    if output["output_type"] == "stream":
        if output["name"] == "stderr":
            return ""
        if cell.metadata.options.get("output") == "asis":
            return generated_markdown(output["text"], cell)
        return fenced(visible(output["text"]), "{.cell-output}")
    data = output["data"]
    if "text/markdown" in data:
        return generated_markdown(data["text/markdown"], cell)
    if "image/png" in data:
        svg = data.get("image/svg+xml", "")
        if 0 < len(svg) < LARGEST_SVG:
            path.with_suffix(".svg").write_text(svg, encoding="utf-8")
            return f"![]({path.name}.svg)"
        path.with_suffix(".png").write_bytes(base64.b64decode(data["image/png"]))
        width = output.get("metadata", {}).get("image/png", {}).get("width")
        return f"![]({path.name}.png)" + (f"{{width={width}px}}" if width else "")
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a progress bar
    if set(data) != {"text/plain"}:
        raise UserError(
            f"{cell.metadata.place}: this cell shows {', '.join(data)}, which the two outputs do "
            "not share; show Markdown"
        )
    return fenced(visible(data["text/plain"]), "{.cell-output}")


def generated_markdown(text: str, cell: NotebookNode) -> str:
    if SHORTCODE.search(text):
        raise UserError(
            f"{cell.metadata.place}: this cell writes a shortcode, which Quarto would obey; "
            "escape generated text or write {{{< ... >}}}"
        )
    return unescape_shortcodes(text)


def unescape_shortcodes(text: str) -> str:
    """Quarto's `{{{< name >}}}` prints `{{< name >}}`."""
    return re.sub(r"\{(\{\{<.*?>\}\})\}", r"\1", text)


def fenced(text: str, attributes: str) -> str:
    ticks = "`" * max(3, 1 + max((len(x) for x in re.findall("`+", text)), default=0))
    return f"{ticks} {attributes}\n{text.rstrip()}\n{ticks}"


def visible(text: str) -> str:
    """The text with the number of each control character in its place."""
    return INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
