"""Texts that are nearly the same: they share most of their runs of three words."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.preferences import Post

WORDS = 3  # in a row; a shorter text is one run
SHARE = 0.5  # of the runs that either text has, from which on two texts are nearly the same


def resemblance(texts: Sequence[str], others: Sequence[str]) -> Float[np.ndarray, "texts"]:
    """The greatest resemblance (Broder, 1997) of each text to one of the others, between 0 and 1.

    It is the number of runs of three words that two texts share, by the number that either has;
    case, punctuation and white space do not count. Exact, with an index in place of MinHash:
    the sets are small enough.
    """
    owners, runs = indexed(others)
    order = np.argsort(runs, kind="stable")
    owners, runs = owners[order], runs[order]
    sizes = np.bincount(owners, minlength=len(others))
    greatest = np.zeros(len(texts))
    for i, text in enumerate(texts):
        own = word_runs(text)
        starts, ends = np.searchsorted(runs, own, "left"), np.searchsorted(runs, own, "right")
        met = [owners[start:end] for start, end in zip(starts, ends, strict=True) if end > start]
        if met:
            which, shared = np.unique(np.concatenate(met), return_counts=True)
            greatest[i] = (shared / (sizes[which] + len(own) - shared)).max()
    return greatest


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> int:
    """How many of the texts are nearly the same as one of the others."""
    return int((resemblance(texts, others) >= SHARE).sum())


def near_duplicate_posts(posts: Sequence[Post], trained: Sequence[Post]) -> int:
    """How many posts have a question or a reply that is nearly one of those trained on."""
    seen = [text for post in trained for text in (post.prompt, *post.replies)]
    owners = [i for i, post in enumerate(posts) for _ in (post.prompt, *post.replies)]
    texts = [text for post in posts for text in (post.prompt, *post.replies)]
    return len({*np.array(owners, int)[resemblance(texts, seen) >= SHARE]})


def indexed(texts: Sequence[str]) -> tuple[Int[np.ndarray, "runs"], Int[np.ndarray, "runs"]]:
    """(number of the text, hash of the run) of every run of every text."""
    of_each = [word_runs(text) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(runs) for runs in of_each])
    return owners, np.concatenate([np.zeros(0, np.int64), *of_each])


def word_runs(text: str) -> Int[np.ndarray, "runs"]:
    """Hashes of the distinct runs of words in a text, in ascending order."""
    words = re.findall(r"\w+", text.casefold())
    starts = range(max(1, len(words) - WORDS + 1)) if words else ()
    runs = [" ".join(words[start : start + WORDS]) for start in starts]
    # Python's own hash: quick, the same within a process, and nothing else is asked of it.
    return np.unique(np.fromiter(map(hash, runs), np.int64, len(runs)))
