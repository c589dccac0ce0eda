"""What a compiled program computes and sends, read from its text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"(?<=[={ ]%)[\w.-]+(?=[,} ]|$)")
RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


class Collective(NamedTuple):
    """An instruction that sends."""

    kind: str
    count: float  # how often it runs
    result: str  # the type that comes out
    line: str


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.search(r"%?([\w.-]+) \(", line)[1] if " (" in line else line
            entry = name if line.startswith("ENTRY") else entry
            lines = found.setdefault(name, [])
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def with_trips(text: str, early: int = 1) -> list[tuple[float, list[str]]]:
    """How often each computation runs, and its lines.

    A loop without a known number of trips, one that may stop early, makes `early` of them.
    """
    parts, entry = computations(text)
    times = dict.fromkeys(parts, 0.0)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in parts[name]:
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            trips = float(known[1]) if known else early if " while(" in line else 1
            inner = count * trips
            for called in set(CALLED.findall(line)) & parts.keys():
                visit(called, inner)

    visit(entry, 1.0)
    return [(times[name], lines) for name, lines in parts.items() if times[name]]


def shapes(lines: list[str]) -> dict[str, str]:
    """The type of every instruction and parameter of a computation."""
    return {found[1]: found[2] for line in lines if (found := RESULT.match(line))}


def numbers(kind: str) -> list[int]:
    """The sizes of the first array in a type."""
    found = SHAPE.search(kind)
    return [int(n) for n in found[2].split(",") if n] if found else []


def product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def bytes_of(kind: str) -> int:
    """Bytes of all arrays in a type."""
    return sum(
        SIZES.get(name, 4) * product(int(n) for n in sizes.split(",") if n)
        for name, sizes in SHAPE.findall(kind)
    )


def flops(text: str, early: int = 1) -> float:
    """Of the matrix products and convolutions, loop bodies times their trips."""
    return sum(
        count * operation_flops(line, kinds)
        for count, lines in with_trips(text, early)
        for kinds in [shapes(lines)]
        for line in lines
    )


def operation_flops(line: str, kinds: dict[str, str]) -> float:
    found = RESULT.match(line)
    if not found or found[3] not in ("dot", "convolution"):
        return 0.0
    out = product(numbers(found[2]))
    operands = re.findall(r"%([\w.-]+)", line[found.end() :].split(")", 1)[0])
    if found[3] == "dot":
        sizes = numbers(kinds[operands[0]])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        inner = [sizes[int(n)] for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * out * product(inner)
    labels = re.search(r"dim_labels=\w+_(\w+)->", line)
    kernel = numbers(kinds[operands[1]])
    spatial = product(n for n, label in zip(kernel, labels[1], strict=True) if label != "o")
    return 2.0 * out * spatial


def sending(text: str, early: int = 1) -> Iterator[Collective]:
    """The instructions that send."""
    for count, lines in with_trips(text, early):
        for line in lines:
            match = RESULT.match(line)
            if match and (kind := match[3].removesuffix("-start")) in COLLECTIVES:
                yield Collective(kind, count, match[2], line)


def collectives(text: str) -> dict[str, dict[str, float]]:
    """By kind: how many, the bytes that come out of all, and of the largest array; trips counted.

    Of several that XLA has combined every array counts as one.
    """
    found: dict[str, dict[str, float]] = {}
    for kind, count, result, _ in sending(text):
        for array in SHAPE.finditer(result):
            own = found.setdefault(kind, {"count": 0, "bytes": 0, "largest": 0})
            size = bytes_of(array[0])
            own["count"] += count
            own["bytes"] += count * size
            own["largest"] = max(own["largest"], size)
    return found


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that each of a ring of cards sends for a collective of which `size` bytes come out."""
    others = (group - 1) / group
    ring = {"all-reduce": 2 * others, "reduce-scatter": group - 1, "collective-permute": 1}
    return size * ring.get(kind, others)


def first_group(line: str) -> list[int]:
    """The devices that take part with the first one, in each of the ways that XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return sorted({int(n) for n in re.findall(r"\d+", pairs[1])})
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in listed[1].split(",")]
    if found := re.search(rf"replica_groups=\[\d+,(\d+)\]<={IOTA}", line):
        return numbered(found[2], found[3]).reshape(-1, int(found[1]))[0].tolist()
    axes = re.search(
        rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({IOTA}\))? \{{(['\w, ]+)\}}", line
    )
    if not axes:
        raise ValueError(f"which devices take part? {line}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    named = re.findall(r"'(\w+)'", axes[4])
    order = [name for name in sizes if name not in named] + named
    ids = numbered(axes[2] or ",".join(sizes.values()), axes[3]).reshape(
        [*map(int, sizes.values())]
    )
    ids = ids.transpose([list(sizes).index(name) for name in order])
    return ids.reshape(-1, product(int(sizes[name]) for name in named))[0].tolist()


def numbered(sizes: str, order: str | None) -> np.ndarray:
    """The devices in an array of these sizes, its axes in another order where one is given."""
    ids = np.arange(product(map(int, sizes.split(",")))).reshape([*map(int, sizes.split(","))])
    return ids.transpose([*map(int, order.split(","))]) if order else ids
