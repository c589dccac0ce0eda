"""What a run on many cards takes, on paper: a model of 1.7B on 8 cards and one of 8B on 64.

    python benchmarks/plan.py --output results/measured/plan.txt

The real programs are compiled for virtual devices, from shapes alone, and their text is read.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hlo
import jax
import programs

from experiment_runs import devices
from rlhf_jax.config import PPOConfig, RewardConfig
from rlhf_jax.language_model.decoder_config import DecoderConfig
from rlhf_jax.memory import Memory

# NVIDIA H100 SXM, data sheet; links in one direction.
FLOPS, HBM, NVLINK, INFINIBAND = 989e12, 3.35e12, 450e9, 50e9  # bfloat16, dense; bytes a second
NODE = 8  # cards
COMPUTES, REACHES = 0.4, 0.8  # assumed shares of these: of products, of every bandwidth
LATENCY = 10e-6  # assumed seconds that a collective takes whatever it sends

PPO = PPOConfig(batch=64, forward_batch=64, prompt_tokens=256, response_tokens=128)
TIME = PPO.prompt_tokens + PPO.response_tokens
REWARD = RewardConfig(batch_rows=64, batch_pairs=64, max_tokens=512)
DEPTHS = 2, 4  # layers that are compiled; all is linear in them, which a third depth shows


class Case(NamedTuple):
    """A model on a mesh, and the depth that must lie on the line."""

    model: str
    mesh: str
    third: int

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: int(n) for axis, n in (part.split("=") for part in self.mesh.split(","))}

    @property
    def cards(self) -> int:
        return self.sizes["data"] * self.sizes["model"]


EIGHT = Case("1.7B", "data=8,model=1", 28)
CASES = EIGHT, Case("8B", "data=8,model=8", 6), Case("8B", "data=64,model=1", 6)
ALONE = Case("1.7B", "data=1,model=1", 2)  # the control: sends nothing, computes all


def bandwidth(group: list[int]) -> float:
    """Bytes a second that each card sends to the next one of a ring of cards, by their numbers.

    Between nodes a ring uses the ports of all cards that it has there.
    """
    there = sum(card // NODE == group[0] // NODE for card in group)
    return NVLINK if there == len(group) else min(NVLINK, INFINIBAND * there)


def decoding_bytes(decoder: DecoderConfig, rows: int, tokens: int, data: int, model: int) -> float:
    """Bytes that a card reads for one token of every row, all in bfloat16: its part of the weights,
    once, and of the keys and values of all tokens."""
    cache = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * rows * tokens
    weights = Memory(decoder=decoder).parameters
    if not decoder.tied_embeddings:  # of one matrix only a few rows are read
        weights -= decoder.vocab_size * decoder.embed_dim
    return 2 * (weights + cache) / (data * model)


def compiled(model: str, layers: int) -> dict[str, dict[str, float]]:
    """Of every program, on one card. In this process, which must be a new one."""
    jax.default_backend = lambda: "gpu"  # programs are laid out as for accelerators
    programs.MODELS[model]["num_hidden_layers"] = layers
    base, rows, placed = programs.model(model), jax.P("data"), programs.placed
    with devices.placement():
        function, (weights, *batch), static = programs.sampling(base, PPO)
        arguments = placed(weights), *placed(batch, rows)
        found = {"sampling": read(function, arguments, static, PPO.response_tokens)}
        function, arguments, static = programs.ppo(base, PPO)
        arguments = *placed(arguments[:2]), *placed(arguments[2:5], rows), *placed(arguments[5:])
        found["PPO update"] = read(function, arguments, static, PPO.inner_epochs)
        function, (*weights, batch), static = programs.reward(base, REWARD)
        arguments = *placed(weights), type(batch)(*placed(batch[:4], rows), *placed(batch[4:]))
        return found | {"reward update": read(function, arguments, static)}


def read(function, arguments, static, early: int = 1) -> dict[str, float]:
    """FLOPs, bytes and numbers of one card; a loop that may stop early makes all its trips."""
    program = function.lower(*arguments, **static).compile()
    text, use = program.as_text(), program.memory_analysis()
    held = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    found = {"flops": hlo.flops(text, early), "memory": held + use.temp_size_in_bytes}
    found |= dict.fromkeys(("in a node", "between", "seconds", "collectives", "gathered"), 0.0)
    arrays = {"nothing": 0.0}
    for kind, count, result, line in hlo.sending(text, early):
        group = hlo.first_group(line)
        if len(group) > 1:
            largest = max((own[0] for own in hlo.SHAPE.finditer(result)), key=hlo.bytes_of)
            out, array = count * hlo.bytes_of(result), f"{kind} of {largest}"
            own = hlo.sent(kind, out, len(group))
            found["between" if bandwidth(group) < NVLINK else "in a node"] += own
            found["seconds"] += own / bandwidth(group)
            found["collectives"] += count
            found["gathered"] += out * (kind == "all-gather")
            arrays[array] = arrays.get(array, 0.0) + own
    what = max(arrays, key=arrays.get)
    return found | {"most": arrays[what], "what": what}


def child(case: Case, layers: int) -> dict[str, dict[str, float]]:
    """What `compiled` finds in a process of its own."""
    command = [sys.executable, __file__, "--one", case.model, str(layers)]
    quickly = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"--xla_force_host_platform_device_count={case.cards} {quickly}"  # nothing is run
    own = {"XLA_FLAGS": flags, "RLHF_MESH": case.mesh, "RLHF_REMAT": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.PIPE)
    print(f"{case.model} {case.mesh}: {layers} layers compiled", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def at(layers: int, few, more):
    """What both depths lead to expect of another one."""
    if isinstance(few, dict):
        return {name: at(layers, few[name], more[name]) for name in few}
    share = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return more if isinstance(more, str) else few + share * (more - few)


def row(name: str, *cells: str | float) -> str:
    shown = (cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)
    return f"{name:15}" + "".join(f"{cell:>14}" for cell in shown)


def seconds(found: dict[str, float], reading: float, *, computes=COMPUTES, reaches=REACHES):
    """Products, reading, links, latency, one after another."""
    products, links = found["flops"] / FLOPS / computes, found["seconds"] / reaches
    return products, reading / HBM / reaches, links, found["collectives"] * LATENCY


def told(case: Case) -> list[str]:
    decoder = programs.model(case.model).config
    few, more, third = (child(case, layers) for layers in (*DEPTHS, case.third))
    whole, line = (at(layers, few, more) for layers in (decoder.num_layers, case.third))
    apart = [
        max(abs(third[name][what] / line[name][what] - 1) for name in few)
        for what in ("flops", "memory", "seconds")
    ]
    title = f"\n{case.model}, {decoder.num_layers} layers, on {case.cards} cards, {case.mesh}"
    off = "{} layers, compiled, are off the line by {:.1%} (FLOPs), {:.1%} (memory), {:.1%} (links)"
    checks = off.format(case.third, *apart), checked(few, more, case)
    return [title, *sizes(case, decoder, whole), *checks, *times(case, decoder, whole)]


def sizes(case: Case, decoder: DecoderConfig, whole) -> list[str]:
    """What a card computes, holds and sends in each program."""
    memory = Memory(decoder=decoder, **case.sizes, remat=True, looped=True)
    alone = memory.sampling(PPO)._replace(weights=memory.weights(1, decoders=1), optimizer=0.0)
    uses = alone, memory.ppo_update(PPO), memory.reward_update(REWARD)
    names = "TFLOP", "GB held", "model's GB", "GB NVLink", "InfiniBand", "collectives"
    lines = [row("of a card", *names) + "   of it the largest"]
    for (name, own), use in zip(whole.items(), uses, strict=True):
        inside, between, most = (own[what] / 1e9 for what in ("in a node", "between", "most"))
        cells = own["flops"] / 1e12, own["memory"] / 1e9, use.total / 1e9, inside, between
        share = f"   {own['what']} ({most / (inside + between):.0%})"
        lines.append(row(name, *cells, f"{own['collectives']:.0f}") + share)
    return lines


def times(case: Case, decoder: DecoderConfig, whole) -> list[str]:
    """How long each program takes, and how that would change."""
    reading = decoding_bytes(decoder, PPO.batch, TIME, **case.sizes) * PPO.response_tokens
    names = "products", "HBM", "links", "latency", "sum", "1/2 products", "1/2 bytes/s"
    lines, steps = [row("seconds", *names, "all at once")], []
    for name, own in whole.items():
        timed = functools.partial(seconds, own, reading if name == "sampling" else 0.0)
        parts, slow, narrow = timed(), timed(computes=COMPUTES / 2), timed(reaches=REACHES / 2)
        sums = sum(parts), sum(slow), sum(narrow), max(parts)
        lines.append(row(name, *parts, *sums))
        steps.append(sums)
    step = [*map(sum, zip(*steps[:2], strict=True))]  # sampling and the update
    lines.append(row("a step of PPO", *[""] * 4, *step))
    return [*lines, f"the protocol's {PPO.steps} steps: {PPO.steps * step[0] / 60:.1f} minutes"]


def checked(few, more, case: Case) -> str:
    """One layer of the PPO update beside arithmetic: three models score; each inner epoch has a
    forward pass, another one but for its last product, and a gradient that costs two."""
    cfg, epochs = programs.model(case.model).config, PPO.inner_epochs
    query, down = cfg.num_heads * cfg.head_dim, cfg.mlp_dim * cfg.embed_dim
    matrices = 2 * cfg.embed_dim * (query + cfg.num_kv_heads * cfg.head_dim) + 3 * down
    passes = (3 + 4 * epochs) * (matrices + 2 * TIME * query) - epochs * down
    flops = 2 * PPO.batch * TIME * passes / case.cards
    gathered = 4 * matrices / case.sizes["model"] * (3 + 2 * epochs)
    few, more, layers = few["PPO update"], more["PPO update"], DEPTHS[1] - DEPTHS[0]
    flops = (more["flops"] - few["flops"]) / layers / flops
    gathered = (more["gathered"] - few["gathered"]) / layers / gathered
    return f"a layer of the PPO update by arithmetic: FLOPs x {flops:.3f}, gathers x {gathered:.3f}"


def control() -> list[str]:
    """One card against eight, the same depth and batches."""
    one, eight = (child(case, DEPTHS[0]) for case in (ALONE, EIGHT))
    title = f"\ncontrol: {ALONE.model}, {DEPTHS[0]} layers, one card instead of {EIGHT.cards}"
    lines = [title, row("of a card", "collectives", "FLOPs times")]
    for name, own in one.items():
        lines.append(row(name, f"{own['collectives']:.0f}", own["flops"] / eight[name]["flops"]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what a child compiles
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(compiled(options.one[0], int(options.one[1]))))
    text = "\n".join([ASSUMED, *(line for case in CASES for line in told(case)), *control()]) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


ASSUMED = f"""A plan on paper; nothing of it was run.

PPO on all weights: {PPO.batch} episodes of {PPO.prompt_tokens} + {PPO.response_tokens} tokens in one forward batch, {PPO.inner_epochs} inner epochs;
the reward model: {REWARD.batch_rows} rows of {REWARD.max_tokens} tokens. No response ends early. Blocks are rematerialised,
and in one loop as on accelerators.
Compiled by XLA for CPUs (jax {jax.__version__}), in float32, at {DEPTHS[0]} and {DEPTHS[1]} layers; the line through both
gives the whole depth. GB held: arguments, results and temporaries; beside it the memory model's.
Other than on a GPU: in bfloat16 activations, frozen models and what sampling gathers and keeps are
half as large; gradients are all-reduced, where XLA for GPUs makes reduce-scatters, which send half,
and takes sums out of loops where it can. So what links carry is an upper bound.
Published, of an H100 SXM: {FLOPS / 1e12:.0f} TFLOP/s (bfloat16, dense), 80 GB of HBM3 at {HBM / 1e12:.2f} TB/s, NVLink
{NVLINK / 1e9:.0f} GB/s each way; InfiniBand {INFINIBAND / 1e9:.0f} GB/s a card, {NODE} cards a node. Assumed: {COMPUTES:.0%} of the FLOPs
and {REACHES:.0%} of every bandwidth are reached; a collective takes {LATENCY * 1e6:.0f} us besides; rings, between
nodes over the ports of all cards that take part; cards numbered by node, `model` inside of `data`.
HBM: decoding reads its part of the weights and the whole cache for every token, in bfloat16; what
the updates read is left out. Sum: nothing overlaps. All at once: the longest of the four alone."""  # noqa: E501

if __name__ == "__main__":
    main()
