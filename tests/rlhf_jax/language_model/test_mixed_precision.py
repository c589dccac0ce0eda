"""Products of bfloat16 operands, with all else in float32, beside float32 itself."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from hlo import collectives

from experiment_runs import devices
from experiment_runs.precision import fast_flag
from experiment_runs.products import matmul
from rlhf_jax.config import EvaluationConfig, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.language_model import attention, logprobs, sampling
from rlhf_jax.language_model.decoder import Decoder, for_products
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.ppo.training import train

ROUNDING = 2.0**-9  # largest relative error of one number in bfloat16


def error(found, truth):
    """Relative to the norm, over all arrays of a tree together."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    return float(norm([a - b for a, b in pairs]) / norm(truth))


def norm(tree):
    return jnp.sqrt(sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(tree)))


def decoder(model, dtype, *, lora=False, **changes):
    """The model's decoder, and weights that are the same for every dtype."""
    config = dataclasses.replace(model.config, dtype=dtype, **changes)
    built = Decoder(config, rngs=nnx.Rngs(0))
    if lora:
        built.add_adapters(LoRAConfig(rank=8, targets=("q_proj", "down_proj")), rngs=nnx.Rngs(1))
        for block in built.blocks:
            block.attention.q_proj.lora_b[...] += 0.1
    return nnx.split(built)


def rows(batch=4, time=16):
    tokens = jax.random.randint(jax.random.key(0), (batch, time), 0, 250)
    starts = jnp.asarray([0, 3, 7, 1])[:batch, None]
    return tokens, jnp.arange(time)[None] >= starts


def loss(definition, state, tokens, mask):
    """Mean logprob of the last half of the tokens, weighted at random."""
    built, prompt = nnx.merge(definition, state), tokens.shape[1] // 2
    states = logprobs.response_states(built, tokens, mask, prompt)
    found = logprobs.token_logprobs(built, states, tokens[:, prompt:], 1.0)
    return (found * jax.random.normal(jax.random.key(5), found.shape)).mean()


@pytest.mark.parametrize("peak", [0.1, 1.0, 10.0])
def test_a_product_and_its_gradient_err_as_rounded_operands_do(peak):
    x, kernel, direction = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(3, 16, 24), (40, 24), (3, 16, 40)])
    )

    def both(products):
        found, pull_back = jax.vjp(lambda *a: matmul(*a, products), peak * x, kernel)
        return [found, *pull_back(direction)]

    for mixed, exact in zip(both("bfloat16"), both("float32"), strict=True):
        assert mixed.dtype == jnp.float32
        assert 0 < error(mixed, exact) < 2 * ROUNDING


@pytest.mark.parametrize("peak", [0.0, 1.0, 4.0, 12.0], ids=lambda peak: f"scores times {peak}")
def test_attention_errs_as_rounded_operands_do_on_flat_and_on_peaked_weights(peak):
    """Scores of a hundred lose half a unit by the rounding of keys and queries: that is no fault
    of the products, so the truth is of rounded ones."""
    query, key, value, direction = (
        jax.random.normal(jax.random.key(i), (2, 16, heads, 8)).astype("bfloat16")
        for i, heads in enumerate([4, 2, 2, 4])
    )
    arrays = [x.astype("float32") for x in ((peak * query).astype("bfloat16"), key, value)]
    mask = jnp.tril(jnp.ones((2, 16, 16), bool))

    def both(products):
        attend = lambda *a: attention.attend(*a, mask, products)  # noqa: E731
        found, pull_back = jax.vjp(attend, *arrays)
        return [found, *pull_back(direction.astype("float32"))]

    for mixed, exact in zip(both("bfloat16"), both("float32"), strict=True):
        assert mixed.dtype == jnp.float32
        assert error(mixed, exact) < 3 * ROUNDING or not jnp.abs(exact).max()


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("lora", [False, True], ids=["every weight", "adapters"])
def test_a_decoder_s_gradient_is_float32_s_within_a_fiftieth_of_its_norm(model, scale, lora):
    gradients = {}
    for dtype in ("float32", "mixed"):
        definition, state = decoder(model, dtype, lora=lora)
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: x if x.ndim < 2 or "lora" in str(path) else scale * x, state
        )
        gradients[dtype] = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(
            definition, state, *rows()
        )
    assert {x.dtype for x in jax.tree.leaves(gradients["mixed"])} == {np.dtype("float32")}
    found = error(gradients["mixed"], gradients["float32"])
    assert 0 < found < 0.02


@pytest.mark.parametrize("lora", [False, True], ids=["every weight", "adapters"])
def test_on_two_devices_no_more_is_gathered_than_in_float32_and_the_gradient_is_that_of_one(
    model, lora
):
    gathered, gradients = {}, {}
    for dtype in ("float32", "mixed"):
        definition, state = decoder(model, dtype, lora=lora)
        gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        if dtype == "mixed":
            one = gradient(definition, state, *rows())
        with devices.placement():
            placed = devices.sharded(state, RULES), *devices.over_devices(rows())
            program = gradient.lower(definition, *placed).compile()
            gathered[dtype] = collectives(program.as_text())["all-gather"]
            gradients[dtype] = devices.on_host(program(*placed))
    assert gathered["mixed"]["count"] <= gathered["float32"]["count"]
    assert gathered["mixed"]["bytes"] <= gathered["float32"]["bytes"]
    assert error(gradients["float32"], one) > 1e-3
    assert error(gradients["mixed"], one) < 1e-3


@pytest.mark.parametrize("lora", [False, True], ids=["every weight", "adapters"])
def test_weights_that_are_kept_as_they_are_multiplied_give_the_same_to_the_bit(model, lora):
    definition, state = decoder(model, "mixed", lora=lora, num_layers=1)
    kept = for_products(state, "bfloat16")
    assert sum(x.nbytes for x in jax.tree.leaves(kept)) < 0.52 * sum(
        x.nbytes for x in jax.tree.leaves(state)
    )
    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    values, gradients = zip(*(gradient(definition, x, *rows()) for x in (state, kept)), strict=True)
    assert values[0] == values[1]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        if one.ndim == 1:  # of norms, which are float32 in both
            np.testing.assert_array_equal(one, other)


def test_a_small_step_changes_the_loss_as_in_float32(model):
    """From numbers of bfloat16, as a checkpoint has them. Weights that are rounded to nearest do
    not see a step of a tenth of the distance between two such numbers."""
    definition, state = decoder(model, "float32")
    start = to_nearest(state)
    gradient = jax.grad(loss, argnums=1)(definition, start, *rows())
    after = jax.tree.map(lambda x, d: x + 1e-5 * jnp.sign(d), start, gradient)

    def change(dtype, after):
        value = jax.jit(functools.partial(loss, decoder(model, dtype)[0]))
        return float(value(after, *rows()) - value(start, *rows()))

    seen = change("float32", after)
    assert change("mixed", to_nearest(after)) < 0.3 * seen
    assert change("mixed", after) == pytest.approx(seen, rel=0.15)


def to_nearest(state):
    return jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), state)


def test_what_is_sampled_is_scored_alike(model):
    """The distribution of the difference in nats; a wrong mask or position makes whole nats."""
    definition, state = decoder(model, "mixed", vocab_size=260)
    state = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, state)
    tokens, mask = rows(time=8)
    responses = sampling.sample(
        state, tokens, mask, sampling.draw_keys(jax.random.key(1), range(4)), 1.0,
        decoder_def=definition, length=32, end=-1, pad=0,
    )  # fmt: skip
    whole = jnp.concatenate([tokens, responses.tokens], axis=1)
    masks = jnp.concatenate([mask, responses.mask], axis=1)
    built = nnx.merge(definition, state)
    states = logprobs.response_states(built, whole, masks, 8)
    scored = logprobs.token_logprobs(built, states, responses.tokens, 1.0)
    difference = np.abs(scored - responses.logprobs)
    assert scored.std() > 0.3  # nats
    assert difference.mean() < 0.01 and difference.max() < 0.1, (
        difference.mean(),
        difference.max(),
    )


@pytest.mark.parametrize("batch, kv_heads", [(1, 2), (2, 4), (1, 1)])
def test_products_that_are_vectors_or_small_can_be_computed_too(model, batch, kv_heads):
    definition, state = decoder(model, "mixed", lora=True, num_kv_heads=kv_heads, num_layers=1)
    tokens, mask = rows(batch, 5)
    found = sampling.sample(
        state, tokens, mask, sampling.draw_keys(jax.random.key(1), range(batch)), 1.0,
        decoder_def=definition, length=2, end=-1, pad=0,
    )  # fmt: skip
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(definition, state, tokens, mask)
    assert jnp.isfinite(found.logprobs).all()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def operands(compiled):
    """Pairs of types of the operands of every product in a compiled program."""
    found = set()
    for part in re.split(r"\n(?=[%E])", compiled.as_text()):
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", part))
        for left, right in re.findall(r" dot\((%[\w.\-]+), (%[\w.\-]+)\)", part):
            found.add((types[left], types[right]))
    return found


@pytest.mark.skipif(not fast_flag(), reason="a processor that multiplies float32 faster")
def test_every_product_is_compiled_to_one_of_bfloat16(model):
    """XLA multiplies in float32 where it dislikes how an operand lies, and does not say so."""
    definition, state = decoder(model, "mixed", lora=True, num_layers=1)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    tokens, mask = rows()
    sampled = sampling.begun.lower(
        state, tokens, mask, sampling.draw_keys(jax.random.key(1), range(4)), 1.0,
        decoder_def=definition, length=16, end=-1, pad=0,
    )  # fmt: skip
    for lowered in (gradient.lower(definition, state, tokens, mask), sampled):
        assert operands(lowered.compile()) == {("bf16", "bf16")}


SIZES = {"prompts": 4, "batch": 4, "forward_batch": 2, "prompt_tokens": 16, "response_tokens": 8}
PROGRAMS = {
    "reward model": lambda base: programs.reward(base, RewardConfig(batch_rows=2, max_tokens=32)),
    "its adapters": lambda base: programs.reward(
        base, RewardConfig(batch_rows=2, max_tokens=32, lora=LoRAConfig())
    ),
    "PPO": lambda base: programs.ppo(base, PPOConfig(**SIZES)),
    "PPO of adapters": lambda base: programs.ppo(base, PPOConfig(lora=LoRAConfig(), **SIZES)),
    "sampling": lambda base: programs.sampling(base, PPOConfig(**SIZES)),
    "evaluation": lambda base: programs.evaluation(
        base, EvaluationConfig(prompts=4, batch=4), PPOConfig(**SIZES)
    ),
}
DOT = re.compile(r"dot_general.* : \(tensor<([\dx]+)x(\w+)>, tensor<([\dx]+)x(\w+)>\)")


@pytest.mark.parametrize("program", PROGRAMS)
def test_all_products_but_those_of_heads_have_operands_of_bfloat16_row_by_row(program, monkeypatch):
    """As they are handed to XLA, on any processor, with one of SmolLM2's layers."""
    monkeypatch.setitem(programs.MODELS, "one", programs.MODELS["135M"] | {"num_hidden_layers": 1})
    function, arguments, static = PROGRAMS[program](programs.model("one", "mixed"))
    text = function.lower(*arguments, **static).as_text()
    dots = DOT.findall(text)
    halves = [dot for dot in dots if dot[1] == dot[3] == "bf16"]
    assert len(halves) > 15
    assert text.count("@LayoutConstraint") == 3 * len(halves)  # operands and result
    for left, _, right, _ in set(dots) - set(halves):
        assert "1" in (*left.split("x"), *right.split("x"))  # a single score or value


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_ppo_begins_with_a_ratio_of_one_and_no_distance_to_the_reference(
    train_toy, variant, tmp_path
):
    """What is sampled with, trained and kept frozen is rounded alike, on several devices, too."""

    def mixed(run, cfg, toy, judge, prompts):
        if cfg.lora:  # dropout would make another policy of the one that sampled
            cfg = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, dropout=0.0))
        config = dataclasses.replace(toy.config, dtype="mixed")
        train(run, cfg, dataclasses.replace(toy, config=config), judge, prompts)

    run, _ = train_toy(variant, tmp_path, train=mixed, passes=2, inner_epochs=2)
    metrics = run.metrics()
    assert metrics["first_ratio_error"].max() < 1e-5
    assert abs(metrics["kl"][0]) < 1e-6 < metrics["kl"][1]
    assert metrics["logprob_error"].max() < 0.05  # nats, sampled against scored
