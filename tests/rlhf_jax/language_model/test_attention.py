import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.language_model import attention

BATCH, TIME, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 4, 2, 6


def inputs(seed=0):
    shapes = [(HEADS,), (KV_HEADS,), (KV_HEADS,)]
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.random.normal(key, (BATCH, TIME, *heads, HEAD_DIM))
        for key, heads in zip(keys, shapes, strict=True)
    ]


def mask_with_padding():
    documents = jnp.asarray([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, -1]])
    segments = jnp.asarray([[0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 0, 1, 0]])
    return attention.block_mask(documents, segments), documents, segments


def plain_attention(query, key, value, mask):
    """As in the textbook, one query head at a time, for JAX to differentiate."""
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = jnp.einsum(
            "btd,bsd->bts", query[:, :, head], key[:, :, shared],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.where(mask, scores / jnp.sqrt(HEAD_DIM), -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        heads.append(weights @ value[:, :, shared])
    return jnp.stack(heads, axis=2)


def test_a_query_sees_earlier_tokens_of_its_prompt_and_its_own_reply_only():
    mask, documents, segments = mask_with_padding()
    for b in range(BATCH):
        for query in range(TIME):
            for key in range(TIME):
                expected = (
                    key <= query
                    and documents[b, key] == documents[b, query] >= 0
                    and segments[b, key] in (0, segments[b, query])
                )
                if documents[b, query] >= 0:
                    assert bool(mask[b, query, key]) == expected
    assert not mask[documents[:, None, :].repeat(TIME, 1) < 0].any()  # nobody sees padding


@jax.jit
def value_and_pulled_back(arrays, mask, direction):
    out, pull_back = jax.vjp(lambda *a: attention.attend(*a, mask), *arrays)
    return [out, *pull_back(direction)]


@jax.jit
def expected_value_and_pulled_back(arrays, mask, direction):
    out, pull_back = jax.vjp(lambda *a: plain_attention(*a, mask), *arrays)
    return [out, *pull_back(direction)]


@pytest.mark.parametrize("whole", [7, 6], ids=["together", "in chunks of queries"])
def test_attention_and_its_gradient_equal_the_plain_formula(monkeypatch, whole):
    """The last of the chunks is not full."""
    monkeypatch.setattr(attention, "WHOLE", whole)
    monkeypatch.setattr(attention, "QUERIES", 3)
    mask, documents, _ = mask_with_padding()
    direction = jax.random.normal(jax.random.key(9), (BATCH, TIME, HEADS, HEAD_DIM))
    direction = jnp.where((documents >= 0)[:, :, None, None], direction, 0.0)
    real = np.asarray(documents >= 0)
    found = jax.jit(value_and_pulled_back.__wrapped__)(inputs(), mask, direction)
    expected = expected_value_and_pulled_back(inputs(), mask, direction)
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_memory_of_long_rows_grows_with_their_length_and_not_its_square(monkeypatch):
    """Of the gradient of a loop over layers, as it is compiled; where all weights are kept, with
    the square."""

    def held(time):
        shape = jax.ShapeDtypeStruct((1, time, HEADS, HEAD_DIM), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, time, time), bool)

        def loss(query, key, value, mask):
            def layer(x, _):
                return attention.attend(x, key, value, mask), None

            return jax.lax.scan(layer, query, length=2)[0].sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, mask)
        return program.compile().memory_analysis().temp_size_in_bytes

    assert held(4096) < 2.5 * held(2048)
    monkeypatch.setattr(attention, "WHOLE", 4096)
    assert held(4096) > 3.5 * held(2048)


@pytest.mark.parametrize("peak", [0.0, 1.0, 4.0, 12.0], ids=lambda peak: f"scores times {peak}")
def test_in_bfloat16_the_gradient_of_attention_errs_no_more_than_jax_s_own(peak):
    """On flat and on peaked weights, where the gradient is a small difference of large numbers.

    Both against float32 on the same inputs, relative to the norm.
    """
    mask = jnp.tril(jnp.ones((BATCH, TIME, TIME), bool))
    query, key, value = inputs()
    arrays = [(peak * query).astype("bfloat16"), key.astype("bfloat16"), value.astype("bfloat16")]
    direction = jax.random.normal(jax.random.key(9), query.shape).astype("bfloat16")
    wide = [x.astype("float32") for x in (*arrays, direction)]
    exact = expected_value_and_pulled_back(wide[:3], mask, wide[3])
    found = value_and_pulled_back(arrays, mask, direction)
    plain = expected_value_and_pulled_back(arrays, mask, direction)
    for ours, jax_s, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        for x in (ours, jax_s):
            assert float(jnp.linalg.norm(x - truth)) <= 0.006 * float(jnp.linalg.norm(truth))


def test_a_query_that_sees_nothing_stays_finite():
    query, key, value = inputs()
    nothing = jnp.zeros((BATCH, TIME, TIME), bool)
    found = value_and_pulled_back([query, key, value], nothing, jnp.ones_like(query))
    assert all(bool(jnp.isfinite(x).all()) for x in found)


@pytest.mark.parametrize("block", [64, 4])
def test_attention_over_a_cache_equals_the_last_row_of_attention(monkeypatch, block):
    """In one block and in several; the last token is written, the others are known before."""
    monkeypatch.setattr(attention, "BLOCK", block)
    query, key, value = inputs()
    mask = jnp.tril(jnp.ones((BATCH, TIME, TIME), bool)).at[1, :, :2].set(False)
    expected = attention.attend(query, key, value, mask)[:, -1]
    cache = attention.filled_cache(key[:, :-1], value[:, :-1], TIME)
    assert cache.keys.shape[2] == -(-TIME // block)
    cache = attention.grown_cache(cache, key[:, -1:], value[:, -1:], jnp.int32(TIME - 1))
    cached = attention.attend_cached(query[:, -1], cache, attention.blocked(mask[:, -1], TIME))
    np.testing.assert_allclose(cached, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1, 50])
def test_rotated_products_depend_on_the_distance_alone(shift):
    query, key, _ = inputs()
    key = jnp.repeat(key, HEADS // KV_HEADS, axis=2)

    def products(offset):
        tables = attention.rotary(offset + TIME, HEAD_DIM, 10_000.0)
        rope = tuple(jnp.tile(table[offset:], (BATCH, 1, 1)) for table in tables)
        turned = attention.rotate(query, rope), attention.rotate(key, rope)
        return jnp.einsum("bthd,bshd->bhts", *turned)

    np.testing.assert_allclose(products(0), products(shift), rtol=1e-3, atol=1e-4)
    assert not np.allclose(products(0), jnp.einsum("bthd,bshd->bhts", query, key), atol=0.1)
