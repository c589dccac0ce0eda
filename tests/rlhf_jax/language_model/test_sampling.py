import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from experiment_runs.devices import over_devices
from rlhf_jax.language_model import logprobs, sampling
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.pretrained.prompt_rows import prompt_rows

LENGTH = 10


@pytest.fixture(scope="module")
def prompts(model):
    rows, mask, _ = prompt_rows(
        ["a", "hello there", "what is it?", "x" * 40], model.tokenizer, length=56
    )
    return jnp.asarray(rows), jnp.asarray(mask)


@pytest.fixture(scope="module")
def sampled(model, prompts):
    """A function that samples with the random model."""

    def sample(key, temperature=1.0, end=model.tokenizer.end, rows=range(4), place=lambda x: x):
        rows = np.asarray(rows)
        keys = sampling.draw_keys(key, rows)
        return sampling.sample(
            model.state, *place((*(x[rows] for x in prompts), keys)), temperature,
            decoder_def=model.definition, length=LENGTH, end=end, pad=model.tokenizer.pad,
        )  # fmt: skip

    return sample


@jax.jit
def next_logits(pieces, tokens, mask):
    """Logits of every response token by one full forward pass, without a cache."""
    decoder = nnx.merge(*pieces)
    return decoder.logits(logprobs.response_states(decoder, tokens, mask, mask.shape[1] - LENGTH))


def recomputed(model, prompts, responses):
    """Response logits when the sampled tokens are read instead of written."""
    tokens = jnp.concatenate([prompts[0], responses.tokens], axis=1)
    mask = jnp.concatenate([prompts[1], responses.mask], axis=1)
    return next_logits((model.definition, model.state), tokens, mask)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_recomputed_ones(model, prompts, sampled, temperature, measured):
    """Up to rounding: the cache sums in another order."""
    responses = sampled(jax.random.key(3), temperature)
    logs = jax.nn.log_softmax(recomputed(model, prompts, responses) / temperature)
    expected = jnp.take_along_axis(logs, responses.tokens[:, :, None], axis=-1)[:, :, 0]
    difference = jnp.abs(jnp.where(responses.mask, expected - responses.logprobs, 0.0))
    measured("sampled against recomputed logprobs (nats)", difference.max(), 5e-6)
    assert not responses.logprobs[~responses.mask].any()


def test_prompts_may_be_read_in_parts(model, prompts, monkeypatch):
    decoder = nnx.merge(model.definition, model.state)
    whole = jax.jit(lambda: sampling.prefill(decoder, decoder.blocks, *prompts, LENGTH))()
    monkeypatch.setattr(sampling, "PREFILL", 3)  # of four rows: two and two
    parts = jax.jit(lambda: sampling.prefill(decoder, decoder.blocks, *prompts, LENGTH))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), parts, whole)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_decoding_is_the_argmax_of_full_forward_passes(model, prompts, sampled, temperature):
    responses = sampled(jax.random.key(0), temperature)
    expected = recomputed(model, prompts, responses).argmax(axis=-1)
    assert bool(responses.mask[:, 0].all())
    np.testing.assert_array_equal(
        np.asarray(responses.tokens)[responses.mask], np.asarray(expected)[responses.mask]
    )


def test_the_same_key_draws_the_same_and_another_key_others(sampled, measured):
    first, again, other = (sampled(jax.random.key(seed)) for seed in (1, 1, 2))
    measured("tokens that differ in two draws of one key", (first.tokens != again.tokens).sum(), 0)
    same = (first.tokens == other.tokens).all(axis=1).sum()
    measured("responses alike in draws of two keys", same, 0)
    assert bool((first.tokens[0] != first.tokens[1]).any())  # rows draw on their own


@pytest.mark.parametrize(
    ("rows", "devices"), [([2], 1), ([3, 1, 2], 1), ([1, 2, 2], 1), ([2, 0], 2), ([0, 1, 2, 3], 2)]
)
def test_what_is_drawn_for_a_prompt_is_the_same_whatever_stands_beside_it(
    model, sampled, rows, devices
):
    """In any place of a batch of any size, on one device or two, and beside rows that end."""
    endless = np.asarray(sampled(jax.random.key(4), end=-1).tokens)
    end = int(endless[1, 2])
    place = over_devices if devices == 2 else lambda batch: batch
    responses = sampled(jax.random.key(4), rows=rows, end=end, place=place)
    for number, tokens, mask in zip(rows, responses.tokens, responses.mask, strict=True):
        count = int(mask.sum())
        assert count == (LENGTH if end not in endless[number] else 3)
        np.testing.assert_array_equal(tokens[:count], endless[number, :count])


def test_any_of_several_tokens_ends_a_response(sampled):
    endless = np.asarray(sampled(jax.random.key(4)).tokens)
    ends = tuple(int(endless[row, 2]) for row in (0, 1))
    mask = np.asarray(sampled(jax.random.key(4), end=ends).mask)
    for row, length in enumerate(mask.sum(axis=1)):
        found = np.isin(endless[row], ends)
        assert length == (found.argmax() + 1 if found.any() else LENGTH)


def test_the_end_token_counts_and_only_padding_follows_it(model, sampled):
    endless = np.asarray(sampled(jax.random.key(4)).tokens)
    end = int(endless[1, 2])
    responses = sampled(jax.random.key(4), end=end)
    tokens, mask = np.asarray(responses.tokens), np.asarray(responses.mask)
    assert mask[1].sum() <= 3
    for row in range(len(tokens)):
        where = np.flatnonzero(endless[row] == end)
        count = where[0] + 1 if len(where) else LENGTH
        assert mask[row].tolist() == [True] * count + [False] * (LENGTH - count)
        np.testing.assert_array_equal(tokens[row, :count], endless[row, :count])
        assert (tokens[row, count:] == model.tokenizer.pad).all()


def test_decoding_stops_when_every_response_has_ended(model, prompts, monkeypatch):
    steps, step = [], Decoder.step

    def counted(decoder, *args):
        jax.debug.callback(lambda: steps.append(1))
        return step(decoder, *args)

    monkeypatch.setattr(Decoder, "step", counted)
    state = jax.tree.map(jnp.zeros_like, model.state)  # equal logits: the first word is taken
    responses = sampling.sample(
        state, *prompts, jax.random.split(jax.random.key(0), 4), 0.0, length=LENGTH + 1, end=0,
        decoder_def=model.definition, pad=model.tokenizer.pad,
    )  # fmt: skip
    jax.block_until_ready(responses)
    jax.effects_barrier()
    assert len(steps) == 1
    assert responses.mask.sum(axis=1).tolist() == [1] * 4


@pytest.mark.parametrize("samples", [1, 2])
def test_rows_that_have_ended_are_decoded_no_further(model, prompts, monkeypatch, samples):
    """And what the others draw is what they would have drawn beside them."""
    count, length = 4 * samples, 24

    def keys():
        return sampling.draw_keys(jax.random.key(4), range(count))

    settings = {
        "decoder_def": model.definition, "length": length, "pad": model.tokenizer.pad,
        "samples": samples,
    }  # fmt: skip
    endless = sampling.sample(model.state, *prompts, keys(), 1.0, end=-1, **settings)
    tokens = np.asarray(endless.tokens)
    ends = tuple(int(tokens[row, 2 + row]) for row in range(count - 1))
    counts = [(*np.flatnonzero(np.isin(row, ends)), length - 1)[0] + 1 for row in tokens]
    assert len({*counts}) > 2

    decoded, step = [], Decoder.step

    def counted(decoder, tokens, *args):
        jax.debug.callback(lambda: decoded.append(len(tokens)))
        return step(decoder, tokens, *args)

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setattr(sampling, "FEWEST", 1)
    monkeypatch.setattr(sampling, "SHORT", 0)
    jax.clear_caches()  # of what was compiled with other constants
    responses = sampling.sample(model.state, *prompts, keys(), 1.0, end=ends, **settings)
    jax.block_until_ready(responses)
    jax.effects_barrier()
    left = [sum(own > step for own in counts) for step in range(max(counts))]
    expected, rows = [], count
    for own in left:
        while rows > 1 and own <= rows // 2:
            rows //= 2
        expected.append(rows)
    assert decoded == expected and sum(decoded) < 0.8 * count * max(counts)
    for row, own in enumerate(counts):
        np.testing.assert_array_equal(responses.tokens[row, :own], tokens[row, :own])
        assert (np.asarray(responses.tokens[row, own:]) == model.tokenizer.pad).all()
        assert np.asarray(responses.mask[row]).tolist() == [True] * own + [False] * (length - own)
        np.testing.assert_allclose(
            responses.logprobs[row, :own], endless.logprobs[row, :own], atol=1e-5
        )
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize(
    ("rows", "samples", "temperature", "dtype"),
    [(33, 1, 1.0, "float32"), (11, 3, 0.7, "mixed"), (20, 1, 1.0, "bfloat16")],
)
def test_a_batch_that_is_halved_answers_as_one_that_is_not(
    model, monkeypatch, rows, samples, temperature, dtype
):
    random = np.random.default_rng(0)
    prompts = random.integers(0, 250, (rows, 7), np.int32), random.random((rows, 7)) < 0.8
    prompts[1][:, -1] = True
    ends = tuple(range(0, 256, 9))
    config = dataclasses.replace(model.config, dtype=dtype)
    settings = {
        "decoder_def": dataclasses.replace(model, config=config).definition, "length": 44,
        "pad": 256, "samples": samples,
    }  # fmt: skip
    sizes, continued = [], sampling.continued

    def counted(state, going, *args, **options):
        sizes.append(len(going.done))
        return continued(state, going, *args, **options)

    def answered():
        keys = sampling.draw_keys(jax.random.key(4), range(rows * samples))
        return sampling.sample(model.state, *prompts, keys, temperature, end=ends, **settings)

    monkeypatch.setattr(sampling, "continued", counted)
    halved = answered()
    assert sizes and max(sizes) <= rows * samples / 2
    monkeypatch.setattr(sampling, "fewer", lambda rows: 0)
    whole = answered()
    np.testing.assert_array_equal(halved.tokens, whole.tokens)
    np.testing.assert_array_equal(halved.mask, whole.mask)
    np.testing.assert_allclose(halved.logprobs, whole.logprobs, atol=0.02)


def test_draws_follow_the_distribution_and_weightless_words_are_never_drawn():
    rng = np.random.default_rng(0)
    vocab, draws = 600, 20_000  # three blocks of words, the last one not full
    logits = rng.normal(size=vocab).astype(np.float32) * 2
    logits[rng.choice(vocab, 300, replace=False)] = -np.inf
    logits[256:300] = logits[-1] = -np.inf
    columns = jnp.broadcast_to(logits[:, None], (vocab, draws))
    numbers = jax.random.uniform(jax.random.key(0), draws)
    drawn, _ = jax.jit(sampling.pick, static_argnums=2)(numbers, columns, 1.0)
    counts = np.bincount(np.asarray(drawn), minlength=vocab)
    assert len(counts) == vocab and not counts[np.isneginf(logits)].any()
    weights = np.exp(logits.astype(np.float64))
    expected = draws * weights / weights.sum()
    frequent = expected >= 5
    observed = [*counts[frequent], counts[~frequent].sum()]
    assert stats.chisquare(observed, [*expected[frequent], expected[~frequent].sum()]).pvalue > 1e-3


def test_a_draw_hits_a_certain_word_wherever_it_stands():
    words = jnp.asarray([0, 255, 256, 511, 512, 599])
    logits = jnp.where(jnp.arange(600)[:, None] == words[None], 0.0, -jnp.inf)
    numbers = jnp.linspace(0, 1, 6, endpoint=False)
    drawn, logprobs = jax.jit(sampling.pick, static_argnums=2)(numbers, logits, 1.0)
    np.testing.assert_array_equal(drawn, words)
    np.testing.assert_array_equal(logprobs, 0.0)


def test_several_responses_from_one_reading_are_those_of_as_many_copies_of_the_prompt(
    model, prompts
):
    first, second = (sampling.draw_keys(jax.random.key(0), range(12)) for _ in range(2))
    options = {
        "decoder_def": model.definition, "length": LENGTH, "end": model.tokenizer.end,
        "pad": model.tokenizer.pad,
    }  # fmt: skip
    copies = tuple(jnp.repeat(x, 3, axis=0) for x in prompts)
    expected = sampling.sample(model.state, *copies, first, 1.0, **options)
    found = sampling.sample(model.state, *prompts, second, 1.0, samples=3, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    assert len(np.unique(found.tokens[:3], axis=0)) == 3  # three draws, not one


def test_every_sample_of_a_prompt_has_a_draw_of_its_own(model):
    """The two hundred and fifty-seventh too, whose number has more than 32 bits."""
    key = jax.random.key(3)
    numbers = np.asarray([5, 5 | 255 << 24, 5 | 256 << 24, 5 | 512 << 24])
    keys = jax.random.key_data(sampling.draw_keys(key, numbers))
    assert len(np.unique(np.asarray(keys), axis=0)) == len(numbers)
    alone = jax.random.key_data(jax.random.fold_in(key, 5))
    np.testing.assert_array_equal(keys[0], alone)  # whatever else is drawn
