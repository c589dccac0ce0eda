"""The arithmetic of the plan: rings step by step, and what a tiny model's arrays hold."""

import hlo
import jax
import jax.numpy as jnp
import plan
import pytest
from flax import nnx

from rlhf_jax.pretrained.model import random_model


def gathering(cards):
    """Parts that each card of a ring sends until all have all, one part passed on at a time."""
    held, passing, count = [{n} for n in range(cards)], list(range(cards)), 0
    while any(len(own) < cards for own in held):
        passing = [passing[n - 1] for n in range(cards)]
        for own, part in zip(held, passing, strict=True):
            own.add(part)
        count += 1
    return count


@pytest.mark.parametrize("cards", [2, 3, 8, 64])
def test_what_a_card_sends_is_what_a_ring_passes_on_step_by_step(cards):
    part = 1000
    whole = part * cards
    assert hlo.sent("all-gather", whole, cards) == pytest.approx(part * gathering(cards))
    assert hlo.sent("reduce-scatter", part, cards) == pytest.approx(part * gathering(cards))
    scattered_and_gathered = 2 * part * gathering(cards)
    assert hlo.sent("all-reduce", whole, cards) == pytest.approx(scattered_and_gathered)
    assert hlo.sent("all-to-all", whole, cards) == pytest.approx(part * (cards - 1))
    assert hlo.sent("collective-permute", whole, cards) == whole


def test_between_nodes_a_ring_has_the_ports_of_its_cards_and_never_more_than_inside():
    assert plan.bandwidth(list(range(8))) == plan.bandwidth([9, 10]) == 450e9
    assert plan.bandwidth(list(range(0, 64, 8))) == 50e9  # one card a node
    assert plan.bandwidth([0, 1, 8, 9]) == 100e9
    assert plan.bandwidth(list(range(64))) == 400e9


@pytest.mark.parametrize("cards", [(1, 1), (4, 1), (2, 2)])
def test_decoding_reads_all_weights_and_the_whole_cache_divided_over_the_cards(cards):
    base, rows, prompt, time = random_model(), 4, 16, 64
    decoder = nnx.merge(base.definition, base.state)
    tokens, mask = jnp.zeros((rows, prompt), int), jnp.ones((rows, prompt, prompt), bool)
    cache = jax.eval_shape(
        lambda: decoder.prefill(tokens, tokens, mask, time, list(decoder.blocks))[1]
    )
    numbers = sum(x.size for x in jax.tree.leaves((base.state, cache)))
    data, model = cards
    told = plan.decoding_bytes(base.config, rows, time, data, model)
    assert told == pytest.approx(2 * numbers / (data * model))


def test_time_is_what_each_part_takes_alone():
    found = {"flops": 0.4 * 989e12, "seconds": 0.8, "collectives": 1000.0}
    assert plan.seconds(found, 2 * 0.8 * 3.35e12) == pytest.approx((1, 2, 1, 0.01))
    assert plan.seconds(found, 0, computes=0.2)[0] == pytest.approx(2)
    assert plan.seconds(found, 0, reaches=0.4)[2] == pytest.approx(2)


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [0, 1]),
        ("replica_groups=[8,8]<=[64], x", list(range(8))),
        ("replica_groups=[8,8]<=[8,8]T(1,0), x", list(range(0, 64, 8))),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=4] {'axis_0'}, x", list(range(0, 32, 4))),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=2] {'a','b'}, x", [0, 2, 4, 6, 8, 10]),
        ("replica_groups=mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'a'}, x", list(range(8))),
        ("source_target_pairs={{0,8},{8,0}}, x", [0, 8]),
    ],
)
def test_the_devices_of_a_collective_are_read_however_they_are_written(written, group):
    assert hlo.first_group(f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {written}") == group


def test_devices_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="which devices take part"):
        hlo.first_group("  %x = f32[8]{0} all-reduce(%y), replica_groups={}")


LOOP = """\
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%going (p: f32[8]) -> pred[] {
  %p = f32[8]{0} parameter(0)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %w = f32[8]{0} while(%p), condition=%going, body=%body TRIPS
}
"""


def test_a_loop_that_may_stop_early_makes_the_trips_that_are_said_and_others_their_own():
    known = LOOP.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"7"}}')
    counts = [sum(found.count for found in hlo.sending(text, 5)) for text in (LOOP, known)]
    assert counts == [5, 7]
    assert hlo.collectives(LOOP)["all-reduce"] == {"count": 1, "bytes": 32, "largest": 32}
