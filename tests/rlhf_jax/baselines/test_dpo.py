"""Direct preference optimisation on small models: its loss, its gradient, and that it learns."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment_runs import run as runs
from experiment_runs.errors import UserError
from rlhf_jax.baselines import dpo
from rlhf_jax.config import DPOConfig
from rlhf_jax.data.preferences import Post
from rlhf_jax.objectives import dpo_loss

CFG = DPOConfig(
    beta=0.5, learning_rate=3e-3, batch_pairs=4, forward_pairs=2, epochs=4, max_tokens=64
)


def posts(count, seed=0):
    """Replies with a "c" are preferred."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abdefgh"), 4)) for _ in range(2 * count)]
    return [
        Post(post_id=str(i), domain="a", prompt=f"{i % 7}ab", replies=(f"cc{a}", b), scores=(2, 1),
             pairs=((0, 1),))
        for i, (a, b) in enumerate(zip(words[::2], words[1::2], strict=True))
    ]  # fmt: skip


PARTS = {"train": posts(24), "validation": posts(8, seed=1)}


@pytest.fixture(scope="module")
def train(toy):
    """A function that trains into a folder, or returns the finished run."""

    def ensure(root, kind=lambda run: run):
        return runs.ensure(
            "dpo", CFG, lambda run: dpo.train(kind(run), CFG, toy, PARTS), inputs={}, root=root
        )

    return ensure


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"))


def batch_of(toy, count=4):
    encoded, _ = dpo.encode_posts(PARTS["train"][:count], toy.tokenizer, max_tokens=64)
    return dpo.pairs_of(encoded)


def test_the_loss_is_that_of_the_paper_written_out():
    logprobs = jnp.asarray([[-3.0, -5.0], [-9.0, -2.0]])
    others = jnp.asarray([[-4.0, -4.0], [-8.0, -4.0]])
    expected = [-math.log(1 / (1 + math.exp(-0.3 * x))) for x in (2.0, -3.0)]
    np.testing.assert_allclose(dpo_loss(logprobs, others, beta=0.3), expected, rtol=1e-6)


def test_a_reply_is_worth_the_sum_of_its_tokens_logprobs_alone(toy):
    """Each reply alone, unpadded, from whole logits."""
    pairs = batch_of(toy)
    decoder = nnx.merge(toy.definition, toy.state)
    found = dpo.reply_logprobs(decoder, dpo.rows(pairs, toy.tokenizer.pad))
    for own, (prompt, *replies) in zip(found, pairs, strict=True):
        for value, reply in zip(own, replies, strict=True):
            tokens = jnp.asarray([[*prompt, *reply]])
            time = tokens.shape[1]
            hidden = decoder(
                tokens, jnp.arange(time)[None], jnp.tril(jnp.ones((time, time), bool))[None]
            )
            logprobs = jax.nn.log_softmax(decoder.logits(hidden), axis=-1)[0, :-1]
            expected = np.asarray(logprobs)[np.arange(time - 1), tokens[0, 1:]][len(prompt) - 1 :]
            assert value == pytest.approx(expected.sum(), rel=1e-5)


def test_before_training_the_loss_is_that_of_a_coin(trained):
    first = trained.metrics().iloc[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_chosen"] == pytest.approx(0, abs=1e-5)


def test_it_learns_which_replies_are_preferred_and_the_saved_policy_has_learnt_it(toy, trained):
    assert trained.summary["validation"]["accuracy"] == 1.0
    assert trained.summary["validation"]["loss"] < 0.5
    definition, state = dpo.tuned_decoder(trained, toy)
    batch = dpo.rows(batch_of(toy, 8), toy.tokenizer.pad)
    own, others = (
        dpo.reply_logprobs(nnx.merge(definition, arrays), batch) for arrays in (state, toy.state)
    )
    gained = np.asarray(own - others)
    assert (gained[:, 0] > gained[:, 1]).all()


def test_parts_of_a_batch_add_up_to_the_gradient_of_the_whole(toy):
    batch = dpo.rows(batch_of(toy), toy.tokenizer.pad)

    def norm(forward_pairs):
        cfg = dataclasses.replace(CFG, forward_pairs=forward_pairs)
        optimizer = dpo.optimizer_for(
            {"all": dpo.decayed_adam(0.0, 0.0)}, lambda path: "all", clip_norm=1.0
        )
        state = dpo.initial_state(jax.tree.map(jnp.copy, toy.state), optimizer)
        _, metrics = dpo.update(
            state, toy.state, batch, definition=toy.definition, optimizer=optimizer, cfg=cfg
        )
        return float(metrics["gradient_norm"])

    def mean_loss(state):
        losses, _ = dpo.some_pairs(state, toy.state, batch, definition=toy.definition, cfg=CFG)
        return losses / 4

    leaves = jax.tree.leaves(jax.grad(mean_loss)(toy.state))
    expected = math.sqrt(sum(float((leaf**2).sum()) for leaf in leaves))
    assert [norm(n) for n in (4, 2, 1)] == pytest.approx([expected] * 3, rel=1e-5)


def test_a_training_that_is_cut_off_goes_on_bit_for_bit(
    train, trained, tmp_path, interruption, timeless
):
    with interruption() as fragile:
        train(tmp_path, fragile)
    assert timeless(train(tmp_path)).equals(timeless(trained))


def test_of_fewer_pairs_than_devices_can_share_every_one_is_measured_once(toy, tmp_path):
    parts = {"train": posts(4), "validation": posts(3, seed=2)}
    cfg = dataclasses.replace(CFG, forward_pairs=4, epochs=1)
    run = runs.ensure(
        "dpo", cfg, lambda run: dpo.train(run, cfg, toy, parts), inputs={}, root=tmp_path
    )
    pairs = dpo.pairs_of(dpo.encode_posts(parts["validation"], toy.tokenizer, max_tokens=64)[0])
    logprobs, others = (
        dpo.reply_logprobs(nnx.merge(toy.definition, state), dpo.rows(pairs, toy.tokenizer.pad))
        for state in (dpo.tuned_decoder(run, toy)[1], toy.state)
    )
    gained = np.asarray(cfg.beta * (logprobs - others))
    expected = {
        "loss": float(dpo_loss(logprobs, others, beta=cfg.beta).mean()),
        "accuracy": (gained[:, 0] > gained[:, 1]).mean(),
        "reward_chosen": gained[:, 0].mean(),
        "reward_rejected": gained[:, 1].mean(),
    }
    assert run.summary["validation"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_too_few_pairs_are_named_with_the_room_that_they_had(toy, tmp_path):
    with pytest.raises(UserError, match="3 train pairs fit into DPOConfig.max_tokens=64; 4 are"):
        few = PARTS | {"train": posts(3)}
        runs.ensure("dpo", CFG, lambda run: dpo.train(run, CFG, toy, few), inputs={}, root=tmp_path)
