"""Offline stand-in for human preferences: the documentation of the installed Python packages.

A question asks what a public function or class does. The right answer is the first paragraph of its
documentation; the wrong ones are graded by how hard they are to tell from it:

    medium   the right paragraph, cut off or with its words in random order
    hard     the paragraph of a neighbour: another function of the same module
    easy     the paragraph of another topic: a function of another package
    partial  not a wrong answer but a second comparison: the cut-off right paragraph is preferred to
             the one about another topic

Which answer is better is known by construction. Nothing is downloaded, nothing is kept on disk, and
the same package versions give the same texts.

Answers are exchanged only inside small closed clusters (four neighbours of one module and four of
a module of another package), each paragraph once as neighbour and once as other topic. So the
answer alone, without its question, does not tell an easy or a hard one from the right one, and
clusters can be put on different sides of a split without sharing a text.
"""

import dataclasses
import functools
import inspect
import itertools
import pkgutil
import platform
import re
import sys
import warnings

import numpy as np
import pandas as pd

LEAST_WORDS, MOST_WORDS = 8, 60
NEIGHBOURS = 4
PAIR_SHARE = 0.5  # of the clusters; the questions of the others are prompts
SCORES = {"right": 8, "medium": 4, "hard": 2, "easy": 1}  # each ratio reaches SteamSHP's filter, 2

QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Can you explain briefly what `{}` does?",
    "I came across `{}` in some code. What is it?",
    "How would you describe `{}` in a sentence or two?",
    "When would I use `{}`?",
)

# Modules and classes whose public members are asked about, by package.
OWNERS = {
    "python": """
        builtins.str builtins.bytes builtins.list builtins.dict builtins.set builtins.int
        builtins.float builtins argparse array ast base64 bisect calendar codecs collections
        collections.Counter collections.deque collections.OrderedDict contextlib copy csv datetime
        datetime.date datetime.datetime decimal decimal.Decimal difflib dis email.utils enum filecmp
        fileinput fnmatch fractions functools gc getpass glob gzip hashlib heapq hmac html importlib
        importlib.metadata importlib.util inspect io ipaddress itertools json linecache locale
        logging lzma math mimetypes multiprocessing operator os os.path pathlib pathlib.Path pickle
        pkgutil platform pprint queue random re runpy sched secrets selectors shelve shlex shutil
        signal socket sqlite3 ssl stat statistics string struct subprocess sys tarfile tempfile
        textwrap threading time timeit tokenize traceback tracemalloc types typing unicodedata
        unittest unittest.mock urllib.parse uuid warnings wave weakref xml.dom.minidom
        xml.etree.ElementTree zipfile zlib""",
    "numpy": """
        numpy numpy.ndarray numpy.char numpy.fft numpy.linalg numpy.ma numpy.polynomial
        numpy.polynomial.chebyshev numpy.polynomial.legendre numpy.polynomial.polynomial
        numpy.random numpy.random.Generator numpy.strings numpy.testing numpy.lib.format
        numpy.lib.recfunctions numpy.lib.scimath numpy.lib.stride_tricks""",
    "scipy": """
        scipy.cluster.hierarchy scipy.cluster.vq scipy.constants scipy.fft scipy.integrate
        scipy.interpolate scipy.io scipy.linalg scipy.linalg.interpolative scipy.ndimage
        scipy.optimize scipy.signal scipy.signal.windows scipy.sparse scipy.sparse.csgraph
        scipy.sparse.linalg scipy.spatial scipy.spatial.distance scipy.special scipy.stats
        scipy.stats.contingency scipy.stats.mstats scipy.stats.qmc""",
    "pandas": """
        pandas pandas.DataFrame pandas.Series pandas.Index pandas.MultiIndex pandas.DatetimeIndex
        pandas.Timestamp pandas.Timedelta pandas.Period pandas.Interval pandas.Categorical
        pandas.Series.str pandas.Series.dt pandas.api.extensions pandas.api.indexers
        pandas.api.types pandas.errors pandas.plotting pandas.testing pandas.tseries.offsets""",
    "jax": """
        jax jax.numpy jax.numpy.fft jax.numpy.linalg jax.lax jax.lax.linalg jax.nn
        jax.nn.initializers jax.random jax.scipy.linalg jax.scipy.signal jax.scipy.special jax.tree
        jax.tree_util jax.debug jax.dtypes jax.image jax.profiler jax.sharding""",
    "optax": """
        optax optax.assignment optax.contrib optax.losses optax.projections optax.schedules
        optax.tree_utils""",
    "flax": "flax.nnx flax.nnx.Module flax.nnx.Variable flax.linen flax.struct flax.traverse_util",
    "skimage": """
        skimage.color skimage.data skimage.draw skimage.exposure skimage.feature skimage.filters
        skimage.filters.rank skimage.graph skimage.io skimage.measure skimage.metrics
        skimage.morphology skimage.registration skimage.restoration skimage.segmentation
        skimage.transform skimage.util""",
}

# Notebooks, consoles and debuggers put functions of their own in the place of these, and the
# stand-in must be the same for all of them.
REPLACED = {
    "input", "getpass.getpass", "sys.breakpointhook", "sys.displayhook", "sys.excepthook",
    "sys.unraisablehook", "threading.excepthook", "warnings.showwarning", "warnings.formatwarning",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A documented function or class and the first paragraph of its documentation."""

    name: str
    package: str
    owner: str  # the module or class that it is a member of
    text: str


Cluster = tuple[list[Entry], list[Entry]]  # two groups of neighbours from different packages


def preferences() -> pd.DataFrame:
    """One row a comparison in SHP's columns, and `grade`, the difficulty named in this module."""
    with_pairs, _ = divided_clusters()
    rows = []
    for number, (first, second) in enumerate(with_pairs):
        rng = np.random.default_rng([0, number])
        for group, topic in ((first, second), (second, first)):
            for position, entry in enumerate(group):
                neighbour = group[(position + NEIGHBOURS // 2) % NEIGHBOURS]
                rows += comparisons(entry, neighbour, topic[position], rng)
    return pd.DataFrame(rows)


def questions() -> list[tuple[Entry, str]]:
    """The entries that no comparison is about, each with its question."""
    _, with_prompts = divided_clusters()
    rng = np.random.default_rng(1)
    chosen = [entry for cluster in with_prompts for group in cluster for entry in group]
    return [(entry, question(entry, rng)) for entry in chosen]


def versions() -> dict[str, str]:
    """The version of every package that the entries came from."""
    return {
        name: platform.python_version() if name == "python" else sys.modules[name].__version__
        for name in dict.fromkeys(entry.package for entry in entries())
    }


def comparisons(
    entry: Entry, neighbour: Entry, topic: Entry, rng: np.random.Generator
) -> list[dict]:
    """The rows about one entry; which answer is A is drawn at random."""
    cut = bool(rng.integers(2))
    answers = {
        "right": entry.text,
        "medium": truncated(entry.text, rng) if cut else scrambled(entry.text, rng),
        "hard": neighbour.text,
        "easy": topic.text,
    }
    pairs = [("right", "medium", "medium"), ("right", "hard", "hard"), ("right", "easy", "easy")]
    if cut:
        pairs.append(("medium", "easy", "partial"))
    history = question(entry, rng)
    rows = []
    for better, worse, grade in pairs:
        label = int(rng.integers(2))  # 1: A is preferred
        a, b = (better, worse) if label else (worse, better)
        rows.append(
            {
                "post_id": entry.name,
                "domain": entry.package,
                "history": history,
                "c_root_id_A": f"{entry.name}/{a}",
                "c_root_id_B": f"{entry.name}/{b}",
                "score_A": SCORES[a],
                "score_B": SCORES[b],
                "human_ref_A": answers[a],
                "human_ref_B": answers[b],
                "labels": label,
                "score_ratio": SCORES[better] / SCORES[worse],
                "grade": grade,
            }
        )
    return rows


def question(entry: Entry, rng: np.random.Generator) -> str:
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(entry.name)


def truncated(text: str, rng: np.random.Generator) -> str:
    """The first 40 to 70 % of the words, and not up to the end of a sentence."""
    words = text.split()
    kept = int(len(words) * rng.uniform(0.4, 0.7))
    while words[kept - 1][-1] in ".!?":
        kept -= 1
    return " ".join(words[:kept]).rstrip(",;:")


def scrambled(text: str, rng: np.random.Generator) -> str:
    """The same words in another order."""
    words = text.split()
    shuffled = words
    while shuffled == words:
        shuffled = [words[i] for i in rng.permutation(len(words))]
    return " ".join(shuffled)


def divided_clusters() -> tuple[list[Cluster], list[Cluster]]:
    """Clusters that comparisons are made of, and clusters whose questions are prompts."""
    groups: list[list[Entry]] = []
    for _, same_owner in itertools.groupby(entries(), key=lambda entry: entry.owner):
        neighbours = list(same_owner)
        whole = len(neighbours) // NEIGHBOURS * NEIGHBOURS
        groups += [neighbours[start : start + NEIGHBOURS] for start in range(0, whole, NEIGHBOURS)]
    rng = np.random.default_rng(2)
    rng.shuffle(groups)
    groups.sort(key=lambda group: group[0].package)
    # Half the list apart, two groups share a package only if it fills more than half of the list.
    half = len(groups) // 2
    pairs = zip(groups[:half], groups[half:], strict=False)
    clusters = [pair for pair in pairs if pair[0][0].package != pair[1][0].package]
    order = rng.permutation(len(clusters))
    clusters = [clusters[i] for i in order]
    boundary = round(PAIR_SHARE * len(clusters))
    return clusters[:boundary], clusters[boundary:]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All members of OWNERS with a usable paragraph, by owner and name.

    No two have the same paragraph, nor names that differ in case only (re.match, re.Match). What is
    not installed is left out; `versions` tells what is there.
    """
    by_text: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated members warn when they are looked at
        for package, owners in OWNERS.items():
            for owner in owners.split():
                for entry in members(package, owner):
                    by_text.setdefault(entry.text.casefold(), entry)
    by_name: dict[str, Entry] = {}
    for entry in by_text.values():
        by_name.setdefault(entry.name.casefold(), entry)
    return tuple(by_name.values())


def members(package: str, owner: str) -> list[Entry]:
    """The usable public members that a module or class has of its own package."""
    try:
        namespace = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return []
    result = []
    for name in sorted(getattr(namespace, "__all__", None) or dir(namespace)):
        try:
            member = getattr(namespace, name)
        except (AttributeError, ImportError):  # removed names that only raise, lazy modules
            continue
        if name.startswith("_") or not callable(member) or not belongs(member, package):
            continue
        text = first_paragraph(own_documentation(member))
        full_name = f"{owner}.{name}".removeprefix("builtins.")
        if text and full_name not in REPLACED:
            result.append(Entry(name=full_name, package=package, owner=owner, text=text))
    return result


def belongs(member: object, package: str) -> bool:
    root = str(getattr(member, "__module__", None) or package).partition(".")[0]
    return root in sys.stdlib_module_names if package == "python" else root == package


def own_documentation(member: object) -> str:
    """The member's documentation, or nothing where it is only that of its class."""
    text = member.__doc__
    inherited = not isinstance(member, type) and text == type(member).__doc__
    return text if isinstance(text, str) and not inherited else ""


SIGNATURE = re.compile(r"[\w.\[\], ]+\(.*\)(\s*->.*)?")
ROLE = re.compile(r"(?::[\w:+-]+:)?`~?\s*([^`<]*?)\s*(?:<[^`>]*>)?`_*")
BOLD = re.compile(r"\*\*(\w[^*]*)\*\*")
NOISE = re.compile(r"::|>>>|\.\. |[\\{}|`]|-{3}|={2}|:param|https?:|_ |rv_\w+ class")


def first_paragraph(documentation: str) -> str:
    """The first paragraph as plain text, with the next one or two while it is short; may be empty.

    A leading signature is passed over. Reading stops at anything that is not prose.
    """
    text = ""
    for block in inspect.cleandoc(documentation).split("\n\n")[:4]:
        block = ROLE.sub(r"\1", re.sub(r"\s*\[\w+\]_", "", block.replace("``", "`")))
        paragraph = " ".join(BOLD.sub(r"\1", block).split())
        if SIGNATURE.fullmatch(paragraph) and not text:
            continue
        if not paragraph[:1].isupper() or NOISE.search(paragraph) or paragraph.endswith(":"):
            break
        if paragraph[-1] not in ".!?":
            paragraph += "."
        longer = f"{text} {paragraph}".strip()
        if len(longer.split()) > MOST_WORDS:
            break
        text = longer
        if len(text.split()) >= LEAST_WORDS:
            return text
    return ""


STANDIN_NAME = "documentation of the installed Python packages"
STANDIN_LICENCE = "the packages' own: PSF-2.0, BSD-3-Clause, Apache-2.0"


def standin_note() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())
