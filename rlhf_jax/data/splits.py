"""Division of posts and prompts into parts that share no text."""

import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiment_runs.errors import UserError
from rlhf_jax.data.preferences import Post, renumbered
from rlhf_jax.data.prompts import Prompt
from rlhf_jax.data.tables import normalised

HELD_OUT = ("test", "validation")  # of the official splits; a text in both belongs to the first
FIRST_NAMES = {"second_reward": "gold"}  # seed the draws, so that new names change no division
COMMON = 8  # posts; a reply that more of them share ("Thanks!") does not hold them together


def split_posts(
    posts: Sequence[Post], *, fractions: Mapping[str, float], seed: int
) -> dict[str, list[Post]]:
    """Parts that share no post and no text, each in random order, so that a prefix is a sample.

    Posts that share a text stay together, unless it is a reply of many; each domain is divided in
    the same proportions, those that are too small for it as one. Official "validation" and "test"
    splits are kept as they are: the remaining parts then divide the rest in proportion. A reply
    that two parts share after that is left out of the later one with its pairs, in the order test,
    validation, the others; so is a post whose identifier or question they share.
    `lost` counts them.

    Args:
      posts: from `posts`.
      fractions: of the posts, by name of the part; the sum is 1.
      seed: for the division.

    Raises:
      UserError: the fractions do not sum to 1, or a part would be empty.
    """
    if not np.isclose(sum(fractions.values()), 1):
        raise UserError(f"fractions of the parts: {dict(fractions)} sum to other than 1")
    given = [name for name in HELD_OUT if any(post.split == name for post in posts)]
    parts: dict[str, list[Post]] = {name: [] for name in [*fractions, *given]}
    for post in posts:
        if post.split in given:
            parts[post.split].append(post)
    held_out = {key for name in given for post in parts[name] for key in keys(post)}
    rest = [post for post in posts if post.split not in given and not asked(post) & held_out]
    by_domain: dict[str, list[list[Post]]] = {}
    for group in (whole := linked(rest)):
        by_domain.setdefault(group[0].domain, []).append(group)
    names = [name for name in fractions if name not in given]
    edges = np.cumsum([fractions[name] for name in names])
    few = edges[-1] / min(fractions[name] for name in names) / 2  # groups: too small a share
    small = sorted(domain for domain, groups in by_domain.items() if len(groups) < few)
    if len(small) > 1:
        by_domain[""] = [group for domain in small for group in by_domain.pop(domain)]
    for domain, groups in sorted(by_domain.items()):
        order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(groups))
        sizes = np.array([len(groups[i]) for i in order])
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        for i, part in zip(order, np.searchsorted(edges / edges[-1], middles), strict=True):
            parts[names[part]] += groups[i]
    parts = apart(parts)
    for name, part in parts.items():
        drawn_as = FIRST_NAMES.get(name, name)
        np.random.default_rng([seed, zlib.crc32(drawn_as.encode())]).shuffle(part)
        if not part and name in fractions:
            raise UserError(
                f"part '{name}' of the posts is empty: {len(posts)} posts, "
                f"{len(posts) - len(rest)} of them in official splits or asking "
                f"what these ask, the others in {len(whole)} groups that "
                "share questions or replies and stay together; give more posts, or "
                "remove replies that many of them share"
            )
    if overlap(parts):
        raise RuntimeError("parts of the posts share texts")
    return {name: parts[name] for name in fractions}


def apart(parts: Mapping[str, list[Post]]) -> dict[str, list[Post]]:
    """The parts without what an earlier one has too, in the order test, validation, the others."""
    seen: set[bytes] = set()
    kept = dict(parts)
    for name in sorted(parts, key=lambda name: [*HELD_OUT, name].index(name)):
        kept[name] = [*filter(None, (without(post, seen) for post in parts[name]))]
        seen.update(key for post in kept[name] for key in keys(post))
    return kept


def without(post: Post, seen: set[bytes]) -> Post | None:
    """The post without the replies that are seen, and None where no pair is left of it."""
    if seen.isdisjoint(keys(post)):
        return post
    if asked(post) & seen:
        return None
    left = {i for i, reply in enumerate(post.replies) if digest_of(reply) not in seen}
    chosen = [i for i, pair in enumerate(post.pairs) if left.issuperset(pair)]
    if not chosen:
        return None
    used, pairs = renumbered(post.pairs[i] for i in chosen)
    return dataclasses.replace(
        post,
        replies=tuple(post.replies[i] for i in used),
        scores=tuple(post.scores[i] for i in used) if post.scores else (),
        pairs=pairs,
        grades=tuple(post.grades[i] for i in chosen) if post.grades else (),
    )


def lost(posts: Sequence[Post], parts: Mapping[str, Sequence[Post]]) -> dict[str, int]:
    """How many posts, pairs and replies are in no part, because others have the same texts."""
    kept = [post for part in parts.values() for post in part]
    return {
        "posts": len(posts) - len(kept),
        "pairs": sum(len(post.pairs) for post in posts) - sum(len(post.pairs) for post in kept),
        "replies": sum(len(p.replies) for p in posts) - sum(len(p.replies) for p in kept),
    }


def linked(posts: Sequence[Post]) -> list[list[Post]]:
    """Groups of posts that share an identifier, a question or a reply that is not common.

    They may share it directly or through other posts.
    """
    leader = list(range(len(posts)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first_with: dict[bytes, int] = {}
    counts = Counter(key for post in posts for key in {*map(digest_of, post.replies)})
    for i, post in enumerate(posts):
        rare = {key for key in map(digest_of, post.replies) if counts[key] <= COMMON}
        for key in asked(post) | rare:
            leader[find(i)] = find(first_with.setdefault(key, i))
    groups: dict[int, list[Post]] = {}
    for i, post in enumerate(posts):
        groups.setdefault(find(i), []).append(post)
    return list(groups.values())


def keys(post: Post) -> Iterator[bytes]:
    """Digests of what two parts must not share: identifier, prompt and replies."""
    yield from asked(post)
    yield from map(digest_of, post.replies)


def asked(post: Post) -> set[bytes]:
    """Digests of identifier and question."""
    return {hashed(f"post_id {post.post_id}"), digest_of(post.prompt)}


def digest_of(text: str) -> bytes:
    return hashed(normalised(text))


def hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def overlap(parts: Mapping[str, Sequence[Post]]) -> int:
    """How many identifiers and texts occur in more than one part."""
    found: dict[bytes, set[str]] = {}
    for name, part in parts.items():
        for post in part:
            for key in keys(post):
                found.setdefault(key, set()).add(name)
    return sum(len(names) > 1 for names in found.values())


def split_prompts(
    prompts: Sequence[Prompt], *, train: int, evaluation: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and prompts that training never sees, from different conversations.

    Questions taken from the preference data, which the reward model may have seen, are used for
    evaluation last. Evaluation takes conversations from the front of a random order, training from
    its back: more of the one leaves the other as it is, as long as there are enough.

    Args:
      prompts: all, their texts distinct.
      train: how many to train on.
      evaluation: how many to keep for evaluation.
      seed: for the draw.

    Raises:
      UserError: there are too few.
    """
    trees: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        trees.setdefault(prompt.tree_id, []).append(prompt)
    rng = np.random.default_rng(seed)
    order = [list(trees.values())[i] for i in rng.permutation(len(trees))]
    order.sort(key=lambda tree: tree[0].origin == "preferences")
    unseen: list[Prompt] = []
    left: list[list[Prompt]] = []
    for tree in order:
        if len(unseen) + len(tree) <= evaluation:
            unseen += tree
        else:
            left.append(tree)
    if left and len(unseen) < evaluation:  # no conversation fits: the end of one is lost
        unseen += left.pop(0)[: evaluation - len(unseen)]
    rest = [prompt for tree in reversed(left) for prompt in tree]
    if len(unseen) < evaluation or len(rest) < train:
        raise UserError(
            f"{len(prompts)} prompts in {len(trees)} conversations are too few for {evaluation} to "
            f"evaluate and {train} to train on; give more data or ask for fewer"
        )
    chosen = rest[:train]
    rng.shuffle(chosen)
    return chosen, unseen
