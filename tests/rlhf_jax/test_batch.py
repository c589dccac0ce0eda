import dataclasses

import numpy as np
import pytest

from reporting.runs import UserError
from rlhf_jax import batch
from rlhf_jax.data import Post

WIDE, PAIRS = 200, 8


@pytest.fixture(scope="module")
def posts(model, random_posts):
    encoded, _ = batch.encode_posts(random_posts(20), model.tokenizer, max_tokens=WIDE)
    return encoded


def packed(model, posts, max_tokens=WIDE):
    return batch.pack(posts, batch_pairs=PAIRS, max_tokens=max_tokens, pad=model.tokenizer.pad)


def read_back(made, posts):
    """(prompt + reply, positions) of every pair's chosen and rejected reply, from the arrays."""
    found = []
    for pair in np.flatnonzero(made.weight):
        for reply in (made.chosen[pair], made.rejected[pair]):
            row, end = made.end_row[reply], made.end_column[reply]
            document, segment = made.documents[row, end], made.segments[row, end]
            seen = (made.documents[row] == document) & np.isin(made.segments[row], (0, segment))
            seen[end + 1 :] = False
            found.append((made.tokens[row][seen].tolist(), made.positions[row][seen].tolist()))
    return found


@pytest.mark.parametrize("max_tokens", [WIDE, 110])
def test_every_pair_can_be_read_back_from_the_rows(model, posts, max_tokens):
    (group, *_) = batch.groups(posts, batch_pairs=PAIRS)
    expected = [
        [*post.prompt, *post.replies[reply]]
        for post in group
        for pair in post.pairs
        for reply in pair
    ]
    found = read_back(packed(model, group, max_tokens), group)
    assert [tokens for tokens, _ in found] == expected
    assert all(positions == list(range(len(positions))) for _, positions in found)
    assert all(tokens[-1] == model.tokenizer.end for tokens, _ in found)


def test_a_post_longer_than_a_row_repeats_its_prompt(model, posts):
    post = max(posts, key=lambda post: len(post.replies))
    whole = len(post.prompt) + sum(map(len, post.replies))
    narrow = packed(model, [batch.subpost(post, range(min(PAIRS, len(post.pairs))))], whole - 1)
    prompt_tokens = ((narrow.segments == 0) & (narrow.documents >= 0)).sum()
    assert prompt_tokens > len(post.prompt) and prompt_tokens % len(post.prompt) == 0


def length(post):
    return len(post.prompt) + sum(map(len, post.replies))


@pytest.mark.parametrize("most_tokens", [None, 100])
def test_every_pair_is_in_exactly_one_batch_and_no_batch_is_overfull(posts, most_tokens):
    order = np.random.default_rng(0).permutation(len(posts))
    made = batch.groups(posts, batch_pairs=3, batch_tokens=most_tokens, order=order)
    assert all(0 < sum(len(post.pairs) for post in group) <= 3 for group in made)
    if most_tokens:
        assert all(len(g) == 1 or sum(map(length, g)) <= most_tokens for g in made)
        assert len(made) > len(batch.groups(posts, batch_pairs=3, order=order))

    def texts(posts):
        return sorted(
            (post.post_id, post.replies[a], post.replies[b])
            for post in posts
            for a, b in post.pairs
        )

    assert texts(post for group in made for post in group) == texts(posts)
    ids = [post.post_id for group in made for post in group]
    assert list(dict.fromkeys(ids)) == [posts[i].post_id for i in order]


def test_the_prompt_is_cut_and_never_a_reply(model):
    tokenizer = model.tokenizer
    post = Post(
        post_id="1", domain="x", prompt="abcdefgh" * 10, replies=("y" * 30, "z" * 90, "w" * 2),
        scores=(1, 1, 1), pairs=((0, 1), (1, 2), (2, 0)), grades=("easy", "hard", "medium"),
    )  # fmt: skip
    (encoded,), fit = batch.encode_posts([post], tokenizer, max_tokens=100)
    room = 100 - tokenizer.template_length - 31
    assert encoded.prompt == (
        *tokenizer.prefix, *tokenizer.encode([post.prompt])[0][:room], *tokenizer.suffix,
    )  # fmt: skip
    kept = [(*tokenizer.encode([text])[0], tokenizer.end) for text in ("y" * 30, "w" * 2)]
    assert list(encoded.replies) == kept
    assert (encoded.pairs, encoded.grades) == (((1, 0),), ("medium",))
    assert dataclasses.asdict(fit) == {
        "posts": 1, "pairs": 1, "prompts_cut": 1, "tokens_cut": 80 - room,
        "replies_dropped": 1, "pairs_dropped": 2,
    }  # fmt: skip


def test_the_first_pairs_are_counted_over_posts(random_posts):
    posts = random_posts(10)
    kept = batch.first_pairs(posts, 7)
    assert sum(len(post.pairs) for post in kept) == 7
    assert [post.post_id for post in kept] == [post.post_id for post in posts[: len(kept)]]
    assert batch.first_pairs(posts, None) == posts


def test_rows_are_rounded_to_few_shapes():
    rounded = [batch.rounded(rows) for rows in range(1, 100)]
    assert all(size >= rows for rows, size in enumerate(rounded, start=1))
    assert set(rounded) == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}


def test_prompts_stand_on_the_right_and_their_text_is_cut_inside_the_template(model):
    tokenizer = model.tokenizer
    length = tokenizer.template_length + 5
    tokens, mask, cut = batch.prompt_rows(["ab", "abcdefgh"], tokenizer, length=length)
    assert cut == 1
    short, long = tokenizer.encode(["ab", "abcde"])
    assert tokens[0].tolist() == [tokenizer.pad] * 3 + [
        *tokenizer.prefix,
        *short,
        *tokenizer.suffix,
    ]
    assert tokens[1].tolist() == [*tokenizer.prefix, *long, *tokenizer.suffix]
    assert mask.tolist() == [[False] * 3 + [True] * (length - 3), [True] * length]


def test_a_template_that_does_not_fit_is_an_error(model):
    length = model.tokenizer.template_length
    with pytest.raises(UserError, match=f"prompt_tokens={length} leaves no room"):
        batch.prompt_rows(["a"], model.tokenizer, length=length)
