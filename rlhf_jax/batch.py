"""Posts and prompts as arrays of fixed shapes.

Preference rows hold a post's prompt once and all its replies behind it; replies do not see each
other and their positions start where the prompt ends, so that a reply's score is what it would be
alone behind the prompt. Rows are filled with whole posts until they are full.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from reporting.runs import UserError
from rlhf_jax.data import Post
from rlhf_jax.tokenizer import Tokenizer

MINIMUM_PROMPT = 16  # tokens of a post's text that must fit beside a reply


@dataclasses.dataclass(frozen=True)
class EncodedPost:
    """Tokens of a post as they go into the model."""

    post_id: str
    domain: str
    prompt: tuple[int, ...]  # template included
    replies: tuple[tuple[int, ...], ...]  # end token included
    pairs: tuple[tuple[int, int], ...]  # (chosen, rejected), indices of replies
    grades: tuple[str, ...]
    cut_tokens: int  # that the prompt lost to fit


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was cut to fit, for the report."""

    posts: int
    pairs: int
    prompts_cut: int
    tokens_cut: int
    replies_dropped: int  # longer than a row by themselves
    pairs_dropped: int


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


def encode_posts(
    posts: Sequence[Post], tokenizer: Tokenizer, *, max_tokens: int
) -> tuple[list[EncodedPost], Fit]:
    """Tokens of the posts; the end of a prompt is cut to fit, never a reply.

    A reply that does not fit beside the shortest useful prompt is left out with its pairs.
    """
    prompts = tokenizer.encode([post.prompt for post in posts])
    replies = tokenizer.encode([reply for post in posts for reply in post.replies])
    room = max_tokens - tokenizer.template_length - MINIMUM_PROMPT
    encoded, start, dropped, pairs_dropped = [], 0, 0, 0
    for post, prompt in zip(posts, prompts, strict=True):
        ends = [(*reply, tokenizer.end) for reply in replies[start : start + len(post.replies)]]
        start += len(post.replies)
        kept = [len(reply) <= room for reply in ends]
        dropped += kept.count(False)
        fitting = [i for i, (a, b) in enumerate(post.pairs) if kept[a] and kept[b]]
        pairs_dropped += len(post.pairs) - len(fitting)
        if not fitting:
            continue
        used = sorted({reply for i in fitting for reply in post.pairs[i]})
        number = {reply: i for i, reply in enumerate(used)}
        longest = max(len(ends[reply]) for reply in used)
        length = min(len(prompt), max_tokens - tokenizer.template_length - longest)
        encoded.append(
            EncodedPost(
                post_id=post.post_id,
                domain=post.domain,
                prompt=(*tokenizer.prefix, *prompt[:length], *tokenizer.suffix),
                replies=tuple(ends[reply] for reply in used),
                pairs=tuple((number[post.pairs[i][0]], number[post.pairs[i][1]]) for i in fitting),
                grades=tuple(post.grades[i] for i in fitting) if post.grades else (),
                cut_tokens=len(prompt) - length,
            )
        )
    fit = Fit(
        posts=len(encoded),
        pairs=sum(len(post.pairs) for post in encoded),
        prompts_cut=sum(post.cut_tokens > 0 for post in encoded),
        tokens_cut=sum(post.cut_tokens for post in encoded),
        replies_dropped=dropped,
        pairs_dropped=pairs_dropped,
    )
    return encoded, fit


def first_pairs(posts: Sequence[Post], count: int | None) -> list[Post]:
    """Posts from the front that hold `count` pairs together; the last one may be cut short."""
    kept, left = [], sum(len(post.pairs) for post in posts) if count is None else count
    for post in posts:
        if left <= 0:
            break
        kept.append(dataclasses.replace(post, pairs=post.pairs[:left], grades=post.grades[:left]))
        left -= len(post.pairs)
    return kept


def subpost(post: EncodedPost, chosen_pairs: Sequence[int]) -> EncodedPost:
    """The post with some of its pairs, and the replies that they need."""
    pairs = [post.pairs[i] for i in chosen_pairs]
    used = sorted({reply for pair in pairs for reply in pair})
    number = {reply: i for i, reply in enumerate(used)}
    return dataclasses.replace(
        post,
        replies=tuple(post.replies[reply] for reply in used),
        pairs=tuple((number[a], number[b]) for a, b in pairs),
        grades=tuple(post.grades[i] for i in chosen_pairs) if post.grades else (),
    )


def groups(
    posts: Sequence[EncodedPost],
    *,
    batch_pairs: int,
    batch_tokens: int | None = None,
    order: Int[np.ndarray, "posts"] | None = None,
) -> list[list[EncodedPost]]:
    """The posts of each batch: whole posts, at most `batch_pairs` pairs together.

    A post with more pairs than that is divided.

    Args:
      posts: encoded.
      batch_pairs: a batch ends before the post that would exceed it.
      batch_tokens: the same for tokens, which bounds the memory of a step; a post that is longer
        by itself is a batch of its own.
      order: indices of the posts, for instance a permutation; as they come by default.
    """
    result: list[list[EncodedPost]] = [[]]
    pairs = tokens = 0
    for index in range(len(posts)) if order is None else order:
        whole = range(len(posts[index].pairs))
        for start in whole[::batch_pairs]:
            part = subpost(posts[index], whole[start : start + batch_pairs])
            length = len(part.prompt) + sum(map(len, part.replies))
            long = batch_tokens is not None and tokens + length > batch_tokens
            if result[-1] and (pairs + len(part.pairs) > batch_pairs or long):
                result.append([])
                pairs = tokens = 0
            result[-1].append(part)
            pairs += len(part.pairs)
            tokens += length
    return result


def pack(posts: Sequence[EncodedPost], *, batch_pairs: int, max_tokens: int, pad: int) -> PairBatch:
    """Fills rows with posts, longest first; a post longer than a row repeats its prompt.

    The number of rows is rounded up to a power of two or one and a half of it, so that few shapes
    have to be compiled.

    Args:
      posts: of one batch, from `groups`.
      batch_pairs: room for pairs; what is left over gets weight 0.
      max_tokens: length of a row.
      pad: the padding token.
    """
    pieces = sorted(pieces_of(posts, max_tokens), key=lambda piece: -piece_length(posts, piece))
    rows: list[list[tuple[int, list[int]]]] = []
    lengths: list[int] = []
    for piece in pieces:
        length = piece_length(posts, piece)
        row = next((r for r, used in enumerate(lengths) if used + length <= max_tokens), None)
        if row is None:
            rows.append([])
            lengths.append(0)
            row = len(rows) - 1
        rows[row].append(piece)
        lengths[row] += length
    shape = (rounded(len(rows)), max_tokens)
    tokens = np.full(shape, pad, np.int32)
    documents, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for r, row in enumerate(rows):
        column = 0
        for document, (p, replies) in enumerate(row):
            prompt = posts[p].prompt
            for segment, part in enumerate([prompt, *(posts[p].replies[i] for i in replies)]):
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
    real = [(number[p, a], number[p, b], 1) for p, post in enumerate(posts) for a, b in post.pairs]
    pairs[: len(real)] = real
    return PairBatch(
        tokens, documents, segments, positions, end[:, 0], end[:, 1],
        pairs[:, 0], pairs[:, 1], pairs[:, 2].astype(np.float32),
    )  # fmt: skip


def pieces_of(posts: Sequence[EncodedPost], max_tokens: int) -> list[tuple[int, list[int]]]:
    """(post, replies) that fit a row; most posts are one piece."""
    pieces = []
    for p, post in enumerate(posts):
        piece, length = [], len(post.prompt)
        for i, reply in enumerate(post.replies):
            if piece and length + len(reply) > max_tokens:
                pieces.append((p, piece))
                piece, length = [], len(post.prompt)
            piece.append(i)
            length += len(reply)
        pieces.append((p, piece))
    return pieces


def piece_length(posts: Sequence[EncodedPost], piece: tuple[int, list[int]]) -> int:
    post = posts[piece[0]]
    return len(post.prompt) + sum(len(post.replies[i]) for i in piece[1])


def rounded(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1
    while power < rows:
        if rows <= power * 3 // 2 and power > 1:
            return power * 3 // 2
        power *= 2
    return power


def prompt_rows(
    texts: Sequence[str], tokenizer: Tokenizer, *, length: int
) -> tuple[Int[np.ndarray, "prompts time"], Bool[np.ndarray, "prompts time"], int]:
    """Prompts in the template, padded on the left, and how many were cut.

    Args:
      texts: the users' texts.
      tokenizer: brings the template.
      length: the longest row; where all prompts are shorter, so are the rows.

    Raises:
      UserError: the template alone does not fit.
    """
    room = length - tokenizer.template_length
    if room < 1:
        raise UserError(
            f"prompt_tokens={length} leaves no room beside the chat template's "
            f"{tokenizer.template_length} tokens; give it more"
        )
    encoded = tokenizer.encode(texts)
    longest = max(map(len, encoded)) + tokenizer.template_length
    length = min(length, -(-longest // 8) * 8)  # whole eights, so that few shapes occur
    tokens = np.full((len(texts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(encoded):
        whole = [*tokenizer.prefix, *text[:room], *tokenizer.suffix]
        tokens[row, length - len(whole) :] = whole
        mask[row, length - len(whole) :] = True
    return tokens, mask, sum(len(text) > room for text in encoded)
