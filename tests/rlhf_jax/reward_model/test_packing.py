import numpy as np
import pytest

from rlhf_jax.reward_model import encoding, packing

WIDE, NARROW, PAIRS = 200, 110, 8


@pytest.fixture(scope="module")
def posts(model, random_posts):
    encoded, _ = encoding.encode_posts(random_posts(20), model.tokenizer, max_tokens=WIDE)
    return encoded


def first_group(posts):
    return packing.groups(posts, batch_pairs=PAIRS, batch_rows=8, max_tokens=WIDE)[0]


def packed(model, group, max_tokens=WIDE):
    shapes = packing.row_shapes([group], max_tokens=max_tokens)
    return packing.pack(group, shapes=shapes, batch_pairs=PAIRS, pad=model.tokenizer.pad)


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


@pytest.mark.parametrize("max_tokens", [WIDE, NARROW])
def test_every_pair_can_be_read_back_from_the_rows(model, posts, max_tokens):
    group = first_group(posts)
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
    narrow = packed(model, [encoding.subpost(post, range(min(PAIRS, len(post.pairs))))], whole - 1)
    prompt_tokens = ((narrow.segments == 0) & (narrow.documents >= 0)).sum()
    assert prompt_tokens > len(post.prompt) and prompt_tokens % len(post.prompt) == 0


def pairs_of(posts):
    return sorted(
        (post.post_id, post.replies[a], post.replies[b]) for post in posts for a, b in post.pairs
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_every_pair_is_in_exactly_one_batch_and_no_batch_is_overfull(posts, rows):
    order = np.random.default_rng(0).permutation(len(posts))
    made = packing.groups(posts, batch_pairs=3, batch_rows=rows, max_tokens=WIDE, order=order)
    assert all(0 < sum(len(post.pairs) for post in group) <= 3 for group in made)
    # a pair whose replies do not fit into one row together needs a second row whatever is allowed
    alone = [len(group) == len(group[0].pairs) == 1 for group in made]
    used = [len(packing.rows_of(group, WIDE)) for group in made]
    assert all(count <= rows or single for count, single in zip(used, alone, strict=True))
    assert pairs_of(post for group in made for post in group) == pairs_of(posts)


def test_a_batch_starts_with_the_first_post_that_is_left(posts):
    order = np.random.default_rng(0).permutation(len(posts))
    made = packing.groups(posts, batch_pairs=8, batch_rows=1, max_tokens=WIDE, order=order)
    left = [posts[i].post_id for i in order]
    for group in made:
        assert group[0].post_id == left[0]
        later = {post.post_id for later in made[made.index(group) + 1 :] for post in later}
        left = [post for post in left if post in later]


def test_shapes_hold_every_batch_and_few_tokens_are_padding(posts):
    plan = packing.groups(posts * 30, batch_pairs=16, batch_rows=3, max_tokens=512)
    shapes = packing.row_shapes(plan, max_tokens=512)
    areas = []
    for group in plan:
        made = packing.pack(group, shapes=shapes, batch_pairs=16, pad=0)
        assert made.tokens.shape in shapes
        areas.append(made.tokens.size)
    tokens = sum(piece.length for g in plan for row in packing.rows_of(g, 512) for piece in row)
    assert len(shapes) <= 4 and tokens / sum(areas) > 0.85


def test_rows_are_a_multiple_of_the_devices(posts):
    plan = packing.groups(posts, batch_pairs=8, batch_rows=3, max_tokens=WIDE)
    assert all(rows % 4 == 0 for rows, _ in packing.row_shapes(plan, max_tokens=WIDE, devices=4))


def test_an_accelerator_compiles_few_shapes_where_a_processor_compiles_several(posts):
    plan = packing.groups(posts * 30, batch_pairs=16, batch_rows=3, max_tokens=512)
    numbers = {
        kind: len(packing.row_shapes(plan, max_tokens=512, **limits))
        for kind, limits in packing.SHAPES.items()
    }
    assert numbers["accelerator"] == 1 < numbers["cpu"]
