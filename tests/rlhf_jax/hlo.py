"""What a compiled program computes and sends, read from its text."""

import re

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"(?<=[={ ]%)[\w.-]+(?=[,} ]|$)")
RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")


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


def with_trips(text: str) -> list[tuple[float, list[str]]]:
    """How often each computation runs, and its lines.

    A loop without a known number of trips, one that may stop early, counts as one trip.
    """
    parts, entry = computations(text)
    times = dict.fromkeys(parts, 0.0)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in parts[name]:
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            inner = count * float(known[1]) if known else count
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


def flops(text: str) -> float:
    """Of the matrix products and convolutions, loop bodies times their trips."""
    return sum(
        count * operation_flops(line, kinds)
        for count, lines in with_trips(text)
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


def collectives(text: str) -> dict[str, dict[str, float]]:
    """By kind: how many, the bytes that come out of all, and of the largest array; trips counted.

    Of several that XLA has combined every array counts as one.
    """
    found: dict[str, dict[str, float]] = {}
    for count, lines in with_trips(text):
        for line in lines:
            match = RESULT.match(line)
            kind = match and match[3].removesuffix("-start")
            for array in SHAPE.finditer(match[2]) if kind in COLLECTIVES else ():
                own = found.setdefault(kind, {"count": 0, "bytes": 0, "largest": 0})
                size = bytes_of(array[0])
                own["count"] += count
                own["bytes"] += count * size
                own["largest"] = max(own["largest"], size)
    return found
