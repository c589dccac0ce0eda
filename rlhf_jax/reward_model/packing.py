"""Posts in packed rows, so that little of a step is padding.

A row holds a post's prompt once and its replies behind it, then the next post. Replies do not see
each other and their positions start where the prompt ends, so that a reply's score is what it would
be alone behind the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.reward_model.encoding import EncodedPost, subpost

LOOKAHEAD = 64  # posts that a batch may reach ahead in the order to fill its rows
# Another shape is compiled where it saves the tokens that train meanwhile, or where more than this
# share is padding. An accelerator trains millions meanwhile; on a CPU every shape also takes
# memory of its own, which the C library does not give back between steps.
SHAPES = {
    "cpu": {"compilation": 8_000, "padding": 0.15},
    "accelerator": {"compilation": 2_000_000, "padding": 1.0},
}


class PairBatch(NamedTuple):
    """Packed posts; padding rows, replies and pairs have weight or document that says so."""

    tokens: Int[Array, "rows time"]
    documents: Int[Array, "rows time"]  # number of the post in its row, -1 on padding
    segments: Int[Array, "rows time"]  # 0 on the prompt, k >= 1 on the k-th reply
    positions: Int[Array, "rows time"]
    end_row: Int[Array, "replies"]  # where each reply's last token stands
    end_column: Int[Array, "replies"]
    chosen: Int[Array, "pairs"]  # indices into the replies
    rejected: Int[Array, "pairs"]
    weight: Float[Array, "pairs"]  # 1, or 0 on padding


class Piece(NamedTuple):
    """A post's prompt with as many of its replies as fit into a row."""

    post: int  # index in its batch
    replies: list[int]
    length: int  # tokens


def groups(
    posts: Sequence[EncodedPost],
    *,
    batch_pairs: int,
    batch_rows: int,
    max_tokens: int,
    order: Int[np.ndarray, "posts"] | None = None,
) -> list[list[EncodedPost]]:
    """The posts of each batch: whole posts, as many as its pairs and its rows allow.

    A post that is larger than a batch is divided. A batch starts with the first post that is left
    and is filled from the next few that still fit.

    Args:
      posts: encoded.
      batch_pairs: most pairs in a batch.
      batch_rows: most rows in a batch, which bounds the memory of a step.
      max_tokens: length of a row.
      order: indices of the posts, for instance a permutation; as they come by default.
    """
    limits = {"batch_pairs": batch_pairs, "batch_rows": batch_rows, "max_tokens": max_tokens}
    indices = range(len(posts)) if order is None else order
    waiting = [part for index in indices for part in divided(posts[index], **limits)]
    result = []
    while waiting:
        group: list[EncodedPost] = []
        for post in waiting[:LOOKAHEAD]:
            if not group or fits([*group, post], **limits):
                group.append(post)
        taken = set(map(id, group))
        waiting = [post for post in waiting if id(post) not in taken]
        result.append(group)
    return result


def divided(post: EncodedPost, **limits: int) -> list[EncodedPost]:
    """The post in parts that a batch can hold; most posts are one part."""
    parts: list[EncodedPost] = []
    first = 0
    for last in range(1, len(post.pairs) + 1):
        if last - first > 1 and not fits([subpost(post, range(first, last))], **limits):
            parts.append(subpost(post, range(first, last - 1)))
            first = last - 1
    return [*parts, subpost(post, range(first, len(post.pairs)))]


def fits(
    group: Sequence[EncodedPost], *, batch_pairs: int, batch_rows: int, max_tokens: int
) -> bool:
    """Whether one batch can hold these posts."""
    pairs = sum(len(post.pairs) for post in group)
    tokens = sum(len(post.prompt) + sum(map(len, post.replies)) for post in group)
    if pairs > batch_pairs or tokens > batch_rows * max_tokens:
        return False
    return len(rows_of(group, max_tokens)) <= batch_rows


def rows_of(group: Sequence[EncodedPost], max_tokens: int) -> list[list[Piece]]:
    """The pieces of every row: the longest first, each in the first row that has room for it."""
    pieces = [piece for p in range(len(group)) for piece in pieces_of(group, p, max_tokens)]
    rows: list[list[Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        row = next((r for r, left in enumerate(room) if piece.length <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(piece)
        room[row] -= piece.length
    return rows


def pieces_of(group: Sequence[EncodedPost], p: int, max_tokens: int) -> list[Piece]:
    """The pieces of one post, which is one piece unless it is longer than a row."""
    post = group[p]
    pieces: list[Piece] = []
    replies, length = [], len(post.prompt)
    for i, reply in enumerate(post.replies):
        if replies and length + len(reply) > max_tokens:
            pieces.append(Piece(p, replies, length))
            replies, length = [], len(post.prompt)
        replies.append(i)
        length += len(reply)
    return [*pieces, Piece(p, replies, length)]


def row_shapes(
    plan: Sequence[Sequence[EncodedPost]],
    *,
    max_tokens: int,
    devices: int = 1,
    compilation: int = SHAPES["cpu"]["compilation"],
    padding: float = SHAPES["cpu"]["padding"],
) -> list[tuple[int, int]]:
    """The few shapes (rows, time) in which all batches of a plan can be laid out.

    Greedy: the smallest shape that holds every batch, then whichever saves the most padding, until
    there is little padding and the next one would not be worth its compilation.

    Args:
      plan: the posts of every batch.
      max_tokens: length of the longest row.
      devices: the rows of a shape are a multiple of it.
      compilation: tokens that train while a shape compiles.
      padding: share of all tokens that may be padding where a shape saves fewer than that.
    """
    lengths = [*range(16, max_tokens, 16), max_tokens]
    needed = np.array([[rows_needed(group, t) for t in lengths] for group in plan])
    needed = np.ceil(needed / devices) * devices
    shapes = [
        (int(rows), time)
        for time, column in zip(lengths, needed.T, strict=True)
        for rows in np.unique(column[np.isfinite(column)])
    ]
    area = np.stack(
        [np.where(needed[:, lengths.index(t)] <= rows, rows * t, np.inf) for rows, t in shapes],
        axis=1,
    )
    tokens = sum(
        piece.length for group in plan for row in rows_of(group, max_tokens) for piece in row
    )
    chosen = [int(area.max(axis=0).argmin())]
    while True:
        best = area[:, chosen].min(axis=1)
        totals = np.minimum(best[:, None], area).sum(axis=0)
        saved = best.sum() - totals.min()
        if saved <= compilation and (saved <= 0 or 1 - tokens / best.sum() <= padding):
            return [shapes[i] for i in chosen]
        chosen.append(int(totals.argmin()))


def rows_needed(group: Sequence[EncodedPost], time: int) -> float:
    """Rows of this length that hold the posts; infinite where a reply is longer than a row."""
    longest = max(len(post.prompt) + max(map(len, post.replies)) for post in group)
    return np.inf if longest > time else float(len(rows_of(group, time)))


def pack(
    group: Sequence[EncodedPost],
    *,
    shapes: Sequence[tuple[int, int]],
    batch_pairs: int,
    pad: int,
) -> PairBatch:
    """The posts of one batch as arrays, in the smallest of the shapes that holds them.

    Args:
      group: from `groups`.
      shapes: (rows, time), from `row_shapes`.
      batch_pairs: room for pairs; what is left over gets weight 0.
      pad: the padding token.
    """
    shape = min(
        (shape for shape in shapes if rows_needed(group, shape[1]) <= shape[0]),
        key=lambda shape: shape[0] * shape[1],
    )
    tokens = np.full(shape, pad, np.int32)
    documents, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for r, row in enumerate(rows_of(group, shape[1])):
        column = 0
        for document, (p, replies, _) in enumerate(row):
            prompt = group[p].prompt
            for segment, part in enumerate([prompt, *(group[p].replies[i] for i in replies)]):
                span = slice(column, column + len(part))
                tokens[r, span], documents[r, span], segments[r, span] = part, document, segment
                positions[r, span] = np.arange(len(part)) + (len(prompt) if segment else 0)
                column += len(part)
                if segment:
                    ends[p, replies[segment - 1]] = (r, column - 1)
    number = {reply: i for i, reply in enumerate(ends)}
    end = np.zeros((2 * batch_pairs, 2), np.int32)
    end[: len(ends)] = list(ends.values())
    pairs = np.zeros((batch_pairs, 3), np.int32)
    real = [(number[p, a], number[p, b], 1) for p, post in enumerate(group) for a, b in post.pairs]
    pairs[: len(real)] = real
    return PairBatch(
        tokens, documents, segments, positions, end[:, 0], end[:, 1],
        pairs[:, 0], pairs[:, 1], pairs[:, 2].astype(np.float32),
    )  # fmt: skip
