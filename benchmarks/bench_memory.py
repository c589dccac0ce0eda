"""The memory model beside what XLA plans for the real programs, and a table for larger models.

    python benchmarks/bench_memory.py --output results/measured/memory.txt

Nothing is loaded or run: the programs are compiled for the CPU from shapes, in float32. Planned is
what a program gets, an array that it gets twice counted once, and what it needs besides.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import programs

from rlhf_jax.config import EvaluationConfig, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.memory import Memory

SHORT = PPOConfig(
    batch=16, forward_batch=8, prompt_tokens=48, response_tokens=32, prompts=192, inner_epochs=2
)
LONG = dataclasses.replace(SHORT, prompt_tokens=128, response_tokens=128)
WIDE = dataclasses.replace(LONG, batch=64)
LORA = dataclasses.replace(SHORT, lora=LoRAConfig())
REWARD = RewardConfig(batch_rows=4, max_tokens=384)
EVALUATION = EvaluationConfig(batch=32)


def configurations():
    """Name, model, program and the model's estimate, one after the other."""
    small, medium = programs.model("135M"), programs.model("0.6B")
    of = {base.name: Memory(decoder=base.config) for base in (small, medium)}
    yield (
        "135M, sampling 64 x (128 + 128)",
        programs.sampling(small, WIDE),
        sampled(of["135M"], WIDE),
    )
    yield "135M, PPO LoRA", programs.ppo(small, LORA), of["135M"].ppo_update(LORA)
    yield "135M, PPO full", programs.ppo(small, SHORT), of["135M"].ppo_update(SHORT)
    yield (
        "135M, reward model 4 x 384",
        programs.reward(small, REWARD),
        of["135M"].reward_update(REWARD),
    )
    yield (
        "135M, KL of 32 x (128 + 128)",
        programs.evaluation(small, EVALUATION, LONG),
        scored(of["135M"]),
    )
    yield "0.6B, PPO LoRA", programs.ppo(medium, LORA), of["0.6B"].ppo_update(LORA)


def sampled(memory: Memory, cfg: PPOConfig):
    """Sampling alone: without what the update needs."""
    return memory.sampling(cfg)._replace(weights=4 * memory.parameters, optimizer=0.0)


def scored(memory: Memory):
    """The KL between two models alone."""
    return memory.evaluation(EVALUATION, SHORT)._replace(
        weights=8 * memory.parameters, cache=0.0, logits=memory.logits(2)
    )


def planned(function, arguments, static) -> float:
    """Bytes that XLA plans for a program."""
    program = function.lower(*arguments, **static).compile()
    analysis = program.memory_analysis()
    unique = {id(leaf): leaf for leaf in jax.tree.leaves(arguments)}
    twice = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments)) - sum(
        leaf.size * leaf.dtype.itemsize for leaf in unique.values()
    )
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes - twice + new + analysis.temp_size_in_bytes


def compared() -> list[str]:
    lines = [f"{'GB':34}{'model':>8}{'planned':>9}{'ratio':>7}"]
    for name, program, use in configurations():
        found = planned(*program)
        jax.clear_caches()
        ratio = use.total / found
        lines.append(f"{name:34}{use.total / 1e9:8.2f}{found / 1e9:9.2f}{ratio:7.2f}")
        print(lines[-1], flush=True)
    return lines


def table() -> list[str]:
    """PPO of the assignment's lengths, one episode a device at a time, blocks rematerialised."""
    meshes = [(1, 1), (8, 1), (64, 1)]
    columns = [f"{kind}, {data * model}" for kind in ("full", "LoRA") for data, model in meshes]
    lines = ["", "GB a device by the model, PPO update in float32, 256 + 128 tokens, --remat,"]
    lines += ["one episode a device at a time, batches of 64; columns: variant, devices (data)"]
    lines.append(f"{'model':8}" + "".join(f"{column:>10}" for column in columns))
    for name in programs.MODELS:
        row = []
        for lora in (None, LoRAConfig()):
            for data, model in meshes:
                cfg = PPOConfig(lora=lora, batch=64, forward_batch=data)
                decoder = programs.model(name).config
                memory = Memory(decoder=decoder, data=data, model=model, remat=True)
                row.append(f"{memory.ppo_update(cfg).total / 1e9:10.1f}")
        lines.append(f"{name:8}" + "".join(row))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    text = "\n".join([*compared(), *table()]) + "\n"
    print("\n".join(table()))
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
