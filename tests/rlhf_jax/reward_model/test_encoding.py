import dataclasses

import pytest

from experiment_runs.errors import UserError
from rlhf_jax.data.preferences import Post
from rlhf_jax.pretrained import prompt_rows
from rlhf_jax.reward_model import encoding


def test_the_prompt_is_cut_and_never_a_reply(model):
    tokenizer = model.tokenizer
    post = Post(
        post_id="1", domain="x", prompt="abcdefgh" * 10, replies=("y" * 30, "z" * 90, "w" * 2),
        scores=(1, 1, 1), pairs=((0, 1), (1, 2), (2, 0)), grades=("easy", "hard", "medium"),
    )  # fmt: skip
    (encoded,), fit = encoding.encode_posts([post], tokenizer, max_tokens=100)
    room = 100 - tokenizer.template_length - 31
    assert encoded.prompt == (
        *tokenizer.prefix, *tokenizer.encode([post.prompt])[0][:room], *tokenizer.suffix,
    )  # fmt: skip
    kept = [(*tokenizer.encode([text])[0], tokenizer.end) for text in ("y" * 30, "w" * 2)]
    assert list(encoded.replies) == kept
    assert (encoded.pairs, encoded.grades) == (((1, 0),), ("medium",))
    assert dataclasses.asdict(fit) == {
        "posts": 1, "pairs": 1, "prompts_cut": 1, "tokens_cut": 80 - room,
        "replies_dropped": 1, "pairs_dropped": 2, "near_duplicates": 0,
    }  # fmt: skip


def test_the_first_pairs_are_counted_over_posts(random_posts):
    posts = random_posts(10)
    kept = encoding.first_pairs(posts, 7)
    assert sum(len(post.pairs) for post in kept) == 7
    assert [post.post_id for post in kept] == [post.post_id for post in posts[: len(kept)]]
    assert encoding.first_pairs(posts, None) == posts


def test_prompts_stand_on_the_right_and_their_text_is_cut_inside_the_template(model):
    tokenizer = model.tokenizer
    length = tokenizer.template_length + 5
    tokens, mask, cut = prompt_rows.prompt_rows(["ab", "abcdefgh"], tokenizer, length=length)
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
        prompt_rows.prompt_rows(["a"], model.tokenizer, length=length)
