import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment_runs.errors import UserError
from rlhf_jax.config import LoRAConfig
from rlhf_jax.language_model import attention
from rlhf_jax.language_model.decoder import Decoder, DecoderConfig
from rlhf_jax.language_model.layers import Linear, gated, matmul, normalized
from rlhf_jax.pretrained.tensor_names import leaf_name

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@jax.jit
def hidden_states(pieces, tokens, mask, dropout_key=None):
    """Hidden states of rows that are padded wherever `mask` is False."""
    documents = jnp.where(mask, 0, -1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    visible = attention.block_mask(documents, jnp.zeros_like(documents))
    return nnx.merge(*pieces)(tokens, positions, visible, dropout_key=dropout_key)


def rows(model, lengths, width, side):
    """Random tokens of some lengths in rows of one width, the same for every width and side."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(lengths), width), model.tokenizer.pad)
    mask = np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if side == "left" else slice(length)
        tokens[row, span], mask[row, span] = rng.integers(4, 260, length), True
    return jnp.asarray(tokens), jnp.asarray(mask)


def plainly_normalized(x, scale):
    return (
        jnp.broadcast_to(scale, x.shape) * x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
    )


OWN_GRADIENTS = pytest.mark.parametrize(
    ("function", "plain", "other", "size"),
    [
        (matmul, lambda x, kernel: x @ kernel.T, (4, 5), 4),
        (gated, lambda gate, up: jax.nn.silu(gate) * up, (2, 3, 5), 5),
        (lambda x, scale: normalized(x, scale, 1e-5), plainly_normalized, (5,), 5),
    ],
    ids=["product", "gate", "norm"],
)


@OWN_GRADIENTS
def test_a_gradient_of_our_own_is_the_one_that_jax_finds(function, plain, other, size):
    x, other, direction = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(2, 3, 5), other, (2, 3, size)])
    )
    found, pull_back = jax.vjp(function, 3 * x, other)
    expected, plain_pull_back = jax.vjp(plain, 3 * x, other)
    pairs = zip(
        (found, *pull_back(direction)), (expected, *plain_pull_back(direction)), strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@OWN_GRADIENTS
@pytest.mark.parametrize("peak", [0.1, 1, 10])
def test_in_bfloat16_a_gradient_of_our_own_errs_as_one_rounding_does(
    function, plain, other, size, peak
):
    """Against float32 on the same inputs; the gradient of parameters is not rounded at all."""
    parameters = other != (2, 3, size)
    x, other, direction = (
        jax.random.normal(jax.random.key(seed), shape).astype("bfloat16")
        for seed, shape in enumerate([(2, 3, 5), other, (2, 3, size)])
    )
    x, wide = (peak * x).astype("bfloat16"), (x.astype("float32") for x in (peak * x, other))
    other = other.astype("float32") if parameters else other
    _, pull_back = jax.vjp(function, x, other)
    _, plain_pull_back = jax.vjp(plain, *wide)
    found, expected = pull_back(direction), plain_pull_back(direction.astype("float32"))
    for ours, truth, given in zip(found, expected, (x, other), strict=True):
        assert ours.dtype == given.dtype
        limit = 1e-5 if given.dtype == jnp.float32 else 4e-3
        assert float(jnp.linalg.norm(ours - truth)) <= limit * float(jnp.linalg.norm(truth))


def test_no_token_changes_what_stands_before_it(model):
    tokens, mask = rows(model, [12, 12], 12, "left")
    changed = tokens.at[:, 7].add(1)
    before, after = (
        hidden_states((model.definition, model.state), t, mask) for t in (tokens, changed)
    )
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before - after)[:, 7:].max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("width, side", [(12, "left"), (12, "right"), (15, "left"), (15, "right")])
def test_hidden_states_do_not_depend_on_padding(model, width, side):
    pieces, lengths = (model.definition, model.state), [12, 5, 9]
    found = hidden_states(pieces, *rows(model, lengths, width, side))
    plain = hidden_states(pieces, *rows(model, lengths, 12, "right"))
    for row, length in enumerate(lengths):
        real = found[row, width - length :] if side == "left" else found[row, :length]
        np.testing.assert_allclose(real, plain[row, :length], atol=1e-5)


@pytest.fixture(scope="module")
def windowed(model):
    """The decoder with two layers that see three tokens each."""
    cfg = dataclasses.replace(
        model.config, windowed_layers=(0, 1), window=3, output_norms=True, activation="gelu_tanh"
    )
    return nnx.split(Decoder(cfg, rngs=nnx.Rngs(0)))


def test_a_token_is_seen_as_far_as_windows_reach_and_no_further(model, windowed):
    tokens, mask = rows(model, [12], 12, "left")
    before, after = (hidden_states(windowed, t, mask) for t in (tokens, tokens.at[:, 2].add(1)))
    changed = np.abs(before - after)[0].max(axis=-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(changed), [2, 3, 4, 5, 6])  # 2 layers, 2 back each


def test_a_window_counts_tokens_of_a_reply_from_its_prompt_wherever_it_is_packed(model, windowed):
    tokens, mask = rows(model, [10], 10, "left")
    alone = hidden_states(
        windowed, jnp.concatenate([tokens[:, :4], tokens[:, 7:]], axis=1), mask[:, :7]
    )
    segments = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2]])
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]])
    visible = attention.block_mask(jnp.zeros_like(segments), segments)
    packed = nnx.merge(*windowed)(tokens, positions, visible)
    np.testing.assert_allclose(packed[:, 7:], alone[:, 4:], atol=1e-5)


@pytest.fixture(scope="module")
def adapted(model):
    """The decoder with adapters on two kinds of layers, before training."""
    lora = LoRAConfig(rank=2, dropout=0.5, targets=("q_proj", "up_proj"))
    decoder = nnx.merge(model.definition, model.state)
    decoder.add_adapters(lora, rngs=nnx.Rngs(0))
    return nnx.split(decoder)


def test_fresh_adapters_change_nothing_and_trained_ones_do(model, adapted):
    tokens, mask = rows(model, [12, 12], 12, "left")
    plain = hidden_states((model.definition, model.state), tokens, mask)
    definition, state = adapted
    np.testing.assert_array_equal(hidden_states((definition, state), tokens, mask), plain)
    trained = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 if "lora_b" in leaf_name(path) else x, state
    )
    assert float(jnp.abs(hidden_states((definition, trained), tokens, mask) - plain).max()) > 1e-3


def test_a_fresh_adapter_is_as_small_as_peft_draws_it():
    """kaiming_uniform_ with a = sqrt(5): uniform within 1 / sqrt(inputs)."""
    linear = Linear(400, 8, rngs=nnx.Rngs(0))
    linear.add_adapter(LoRAConfig(rank=64), rngs=nnx.Rngs(1))
    drawn = np.abs(np.asarray(linear.lora_a[...]))
    assert 0.99 / 20 < drawn.max() <= 1 / 20
    assert abs(drawn.mean() - 0.5 / 20) < 0.01 / 20


def test_an_adapter_adds_alpha_over_rank_times_its_product(adapted):
    linear = nnx.merge(*adapted).blocks[0].mlp.up_proj
    linear.lora_b[...] = jax.random.normal(jax.random.key(0), linear.lora_b.shape)
    x = jax.random.normal(jax.random.key(1), (3, linear.kernel.shape[1]))
    product = linear.lora_b[...] @ linear.lora_a[...]
    expected = x @ (linear.kernel[...] + 32.0 / 2 * product).T
    np.testing.assert_allclose(linear(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear.columns(x.T), expected.T, rtol=1e-4, atol=1e-5)


def test_dropout_needs_a_key_and_keeps_the_mean(adapted):
    linear = nnx.merge(*adapted).blocks[0].mlp.up_proj
    linear.lora_b[...] = jax.random.normal(jax.random.key(0), linear.lora_b.shape)
    x = jnp.ones((1, linear.kernel.shape[1]))
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.vmap(lambda key: linear(x, key))(keys)
    assert float(drawn.std(axis=0).min()) > 0.1
    standard_error = drawn.std(axis=0) / np.sqrt(len(keys))
    assert float((jnp.abs(drawn.mean(axis=0) - linear(x)) / standard_error).max()) < 5


def test_adapters_sit_on_the_layers_that_are_named_and_nowhere_else(adapted):
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapted[1])]
    with_adapter = {name.split(".")[-2] for name in names if "lora_" in name}
    assert with_adapter == {"q_proj", "up_proj"}
    assert sum("lora_a" in name for name in names) == sum("lora_b" in name for name in names) == 4


def test_logits_are_float32_where_activations_are_bfloat16(model):
    half = dataclasses.replace(model.config, dtype="bfloat16")
    decoder = Decoder(half, rngs=nnx.Rngs(0))
    hidden = decoder.embedding[...][:5].astype("bfloat16")
    assert decoder.logits(hidden).dtype == jnp.float32


def test_the_family_decides_biases_and_norms_of_queries():
    qwen2 = DecoderConfig.from_huggingface(QWEN2)
    qwen3 = DecoderConfig.from_huggingface(QWEN2 | {"model_type": "qwen3", "head_dim": 4})
    assert (qwen2.attention_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 8)
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 4)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_configurations_that_are_not_supported_are_named(change, named):
    with pytest.raises(UserError, match=named):
        DecoderConfig.from_huggingface(QWEN2 | change)


def test_a_missing_field_of_the_configuration_is_named():
    incomplete = {name: value for name, value in QWEN2.items() if name != "hidden_size"}
    with pytest.raises(UserError, match="hidden_size"):
        DecoderConfig.from_huggingface(incomplete)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("alpha", 0.0),
        ("dropout", 1.0),
        ("dropout", 0.001),
        ("dropout", 0.999),
        ("targets", ("q_proj", "lm_head")),
    ],
)
def test_adapters_that_cannot_be_are_rejected_by_name(field, value):
    with pytest.raises(UserError, match=f"LoRAConfig.{field}"):
        LoRAConfig(**{field: value})
