"""What the memory model says of changes; its figures are checked by benchmarks/bench_memory.py."""

import dataclasses

import jax
import pytest

from rlhf_jax import memory
from rlhf_jax.config import LoRAConfig
from rlhf_jax.memory import Memory
from rlhf_jax.ppo.actor_critic import build
from rlhf_jax.profiles import profile

TINY = profile("tiny")


@pytest.fixture
def one(model):
    return Memory(decoder=model.config)


def test_devices_share_what_is_trained_and_what_it_is_trained_with(one):
    use = one.ppo_update(TINY.ppo)
    for data, model in ((2, 1), (2, 2), (4, 2)):
        shared = dataclasses.replace(one, data=data, model=model).ppo_update(TINY.ppo)
        for part in ("weights", "optimizer", "gradients"):
            assert getattr(shared, part) == pytest.approx(getattr(use, part) / data / model)
        matrix = 4 * one.decoder.vocab_size * one.decoder.embed_dim  # bytes; two and gradients
        expected = (use.logits + 4 * matrix) / model  # of as many tokens on each
        assert shared.logits == pytest.approx(expected)
        assert shared.total < use.total


def test_adapters_and_rematerialised_blocks_take_less(one):
    full, lora = one.ppo_update(TINY.ppo), one.ppo_update(TINY.lora)
    assert lora.optimizer < 0.2 * full.optimizer and lora.weights < 0.8 * full.weights
    again = dataclasses.replace(one, remat=True).ppo_update(TINY.ppo)
    assert again.activations < full.activations and again.weights == full.weights


def test_adapters_are_counted_as_they_are_made(one, model):
    lora = LoRAConfig(targets=("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"))
    tuned = build(model, lora, seed=0, critic=False)
    assert one.adapters(lora) == sum(leaf.size for leaf in jax.tree.leaves(tuned.trainable))


def test_what_does_not_fit_is_told_with_what_would_change_it(monkeypatch, model, one):
    monkeypatch.setenv("RLHF_MESH", "data=1")
    assert "does not fit" not in memory.dry_run(model.config, TINY)
    needed = one.ppo_update(TINY.ppo).total
    monkeypatch.setattr(memory, "available", lambda: 0.95 * needed)
    told = memory.dry_run(model.config, TINY)
    assert "ppo-full: update does not fit; these would: --remat; a smaller forward_batch" in told
    monkeypatch.setattr(memory, "available", lambda: 1.0)
    assert "reward does not fit; use a smaller model" in memory.dry_run(model.config, TINY)
    wide = dataclasses.replace(one, data=2 * TINY.ppo.batch)  # more than there are episodes
    told = memory.remedies(wide, TINY, "ppo-full: update", there=1.0)
    assert told == "use a smaller model"
