import numpy as np

from rlhf_jax.data.near_duplicates import (
    near_duplicate_posts,
    near_duplicates,
    resemblance,
)
from rlhf_jax.data.preferences import Post

WORDS = "one two three four five six seven eight nine ten eleven".split()  # noqa: SIM905


def naive(text, other):
    """Resemblance straight from its definition, for texts without punctuation."""
    sets = [
        {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        for words in (text.split(), other.split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_resemblance_is_that_of_the_closest_text():
    rng = np.random.default_rng(0)
    whole = [" ".join(rng.choice(WORDS[:3], rng.integers(1, 14))) for _ in range(60)]
    texts, others = whole[:25], whole[25:]
    expected = [max(naive(text, other) for other in others) for text in texts]
    np.testing.assert_allclose(resemblance(texts, others), expected)


def test_case_punctuation_and_a_changed_word_do_not_hide_a_copy():
    text = "Yeast eats the sugar in the dough and makes gas; the gas cannot leave, so it rises."
    copies = [text.upper(), text.replace(";", " -- "), text.replace("dough", "flour")]
    assert near_duplicates(copies, ["Something else entirely.", text]) == 3
    assert near_duplicates(["Thanks!!"], ["thanks"]) == 1
    assert near_duplicates([" ".join(WORDS)], [" ".join(WORDS[::-1])]) == 0


def test_a_post_is_met_by_its_question_or_by_a_reply():
    def post(prompt, *replies):
        return Post(post_id="p", domain="", prompt=prompt, replies=replies, scores=(), pairs=())

    trained = [post("Why does bread rise in the oven?", "Because of the gas that yeast makes.")]
    held_out = [
        post("Why does bread rise in the oven", "Physics."),
        post("How?", "Magic.", "Because of the gas that yeast makes!"),
        post("Why does steel rust in the rain?", "Because of the oxygen that water brings."),
    ]
    assert near_duplicate_posts(held_out, trained) == 2
    assert near_duplicate_posts(held_out[:1], trained) == near_duplicate_posts(held_out, []) + 1


def test_nothing_resembles_nothing():
    assert near_duplicates([], ["x"]) == near_duplicates(["x", "", "?!"], []) == 0
    assert near_duplicates(["", "?!"], ["", "..."]) == 0
