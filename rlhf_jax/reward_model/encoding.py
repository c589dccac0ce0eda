"""Posts as tokens that fit."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiment_runs.errors import UserError
from rlhf_jax.data.dialogues import Turn
from rlhf_jax.data.preferences import Post, renumbered
from rlhf_jax.pretrained.prompt_rows import fit_dialogues
from rlhf_jax.pretrained.tokenizer import Tokenizer

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
    near_duplicates: int = 0  # posts that nearly repeat what is trained on


Parts = dict[str, tuple[list[EncodedPost], Fit]]  # by name: "train", "validation", "test"


def encode_parts(
    parts: Mapping[str, Sequence[Post]], tokenizer: Tokenizer, *, max_tokens: int
) -> Parts:
    """The posts of each part as tokens.

    Raises:
      UserError: no pair of a part fits.
    """
    encoded = {
        name: encode_posts(posts, tokenizer, max_tokens=max_tokens) for name, posts in parts.items()
    }
    for name, (posts, _) in encoded.items():
        if not posts:
            raise UserError(
                f"RewardConfig.max_tokens={max_tokens} is too short for both replies of any "
                f"{name} pair; give it more"
            )
    return encoded


def encode_posts(
    posts: Sequence[Post], tokenizer: Tokenizer, *, max_tokens: int
) -> tuple[list[EncodedPost], Fit]:
    """Tokens of the posts; the end of a prompt is cut to fit, never a reply.

    A reply that does not fit beside the shortest useful prompt is left out with its pairs.
    """
    prompts = tokenizer.encode([post.prompt for post in posts])
    replies = tokenizer.encode([reply for post in posts for reply in post.replies], reply=True)
    room = max_tokens - tokenizer.template_length - MINIMUM_PROMPT
    encoded, start, dropped, pairs_dropped = [], 0, 0, 0
    dialogues: dict[int, tuple[tuple[Turn, ...], int]] = {}  # and how many tokens they may have
    for post, prompt in zip(posts, prompts, strict=True):
        ends = [
            (*reply, *tokenizer.closing) for reply in replies[start : start + len(post.replies)]
        ]
        start += len(post.replies)
        kept = [len(reply) <= room for reply in ends]
        dropped += kept.count(False)
        fitting = [i for i, (a, b) in enumerate(post.pairs) if kept[a] and kept[b]]
        pairs_dropped += len(post.pairs) - len(fitting)
        if not fitting:
            continue
        used, pairs = renumbered(post.pairs[i] for i in fitting)
        longest = max(len(ends[reply]) for reply in used)
        if post.turns:
            dialogues[len(encoded)] = post.turns, max_tokens - longest
        length = min(len(prompt), max_tokens - tokenizer.template_length - longest)
        encoded.append(
            EncodedPost(
                post_id=post.post_id,
                domain=post.domain,
                prompt=(*tokenizer.prefix, *prompt[:length], *tokenizer.suffix),
                replies=tuple(ends[reply] for reply in used),
                pairs=pairs,
                grades=tuple(post.grades[i] for i in fitting) if post.grades else (),
                cut_tokens=len(prompt) - length,
            )
        )
    for i, whole, (kept, _) in zip(dialogues, *dialogue_tokens(dialogues, tokenizer), strict=True):
        encoded[i] = dataclasses.replace(
            encoded[i], prompt=kept, cut_tokens=max(len(whole) - len(kept), 0)
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


def dialogue_tokens(
    dialogues: Mapping[int, tuple[tuple[Turn, ...], int]], tokenizer: Tokenizer
) -> tuple[list[tuple[int, ...]], list[tuple[tuple[int, ...], str | None]]]:
    """Tokens of dialogues as they are, and as they fit."""
    turns, lengths = zip(*dialogues.values(), strict=True) if dialogues else ((), ())
    return tokenizer.encode_dialogues(turns), fit_dialogues(turns, tokenizer, lengths=lengths)


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
    used, pairs = renumbered(post.pairs[i] for i in chosen_pairs)
    return dataclasses.replace(
        post,
        replies=tuple(post.replies[reply] for reply in used),
        pairs=pairs,
        grades=tuple(post.grades[i] for i in chosen_pairs) if post.grades else (),
    )
