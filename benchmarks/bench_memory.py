"""The memory model beside measured peaks of the real programs, and a table for larger models.

    python benchmarks/bench_memory.py --output results/measured/memory.txt

Each program runs in a process of its own, on the CPU, with arrays of zeros: measured is the peak of
its resident memory less what the process took before there was an array. What compiling takes is
not in it.
"""

import argparse
import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import programs

from experiment_runs.process import forget_peak_memory, peak_memory_gb
from rlhf_jax.config import EvaluationConfig, LoRAConfig, PPOConfig, RewardConfig
from rlhf_jax.memory import Memory, Use
from rlhf_jax.optimization.state import compiled

SHORT = PPOConfig(
    batch=16, forward_batch=8, prompt_tokens=48, response_tokens=32, prompts=192, inner_epochs=2
)
LONG = dataclasses.replace(SHORT, prompt_tokens=128, response_tokens=128)
WIDE = dataclasses.replace(LONG, batch=64)
LORA = dataclasses.replace(SHORT, lora=LoRAConfig())
REWARD = RewardConfig(batch_rows=4, max_tokens=384)
EVALUATION = EvaluationConfig(batch=32)
PRECISIONS = ("float32", "mixed")


class Case(NamedTuple):
    """A program, and what the model says that it takes."""

    model: str
    program: Callable[..., tuple[Any, tuple, dict]]  # of the model's shapes
    estimate: Callable[[Memory], Use]


def sampled(memory: Memory) -> Use:
    """Sampling alone: without what the update needs."""
    return memory.sampling(WIDE)._replace(weights=memory.weights(1, decoders=1), optimizer=0.0)


def scored(memory: Memory) -> Use:
    """The KL between two models alone."""
    return memory.evaluation(EVALUATION, SHORT)._replace(
        weights=memory.weights(2, decoders=2), cache=0.0, logits=memory.logits(2)
    )


CASES = {
    "sampling 64 x (128 + 128)": Case(
        "135M", functools.partial(programs.sampling, cfg=WIDE), sampled
    ),
    "PPO LoRA": Case(
        "135M", functools.partial(programs.ppo, cfg=LORA), lambda model: model.ppo_update(LORA)
    ),
    "PPO full": Case(
        "135M", functools.partial(programs.ppo, cfg=SHORT), lambda model: model.ppo_update(SHORT)
    ),
    "reward model 4 x 384": Case(
        "135M", functools.partial(programs.reward, cfg=REWARD),
        lambda model: model.reward_update(REWARD),
    ),
    "evaluation, KL of 32 x (128 + 128)": Case(
        "135M", functools.partial(programs.evaluation, cfg=EVALUATION, lengths=LONG),
        scored,
    ),
    "PPO LoRA, 0.6B": Case(
        "0.6B", functools.partial(programs.ppo, cfg=LORA), lambda model: model.ppo_update(LORA)
    ),
}  # fmt: skip


def measured(name: str, dtype: str) -> float:
    """GB that a program takes, in this process, which must be a new one."""
    case = CASES[name]
    jnp.zeros(8).block_until_ready()
    idle = peak_memory_gb()
    model = programs.model(case.model, dtype, zeros=True)
    function, arguments, static = case.program(model)
    arguments = programs.filled(arguments)
    program = compiled(function, *arguments, **static)
    forget_peak_memory()
    jax.block_until_ready(program(*arguments))
    return peak_memory_gb() - idle


def compared() -> list[str]:
    lines = [f"{'GB':36}{'precision':>10}{'model':>8}{'measured':>10}{'ratio':>7}"]
    for name, case in CASES.items():
        for dtype in PRECISIONS:
            command = [sys.executable, __file__, "--one", name, "--precision", dtype]
            found = float(subprocess.run(command, check=True, capture_output=True).stdout)
            decoder = programs.model(case.model, dtype).config
            told = case.estimate(Memory(decoder=decoder)).total / 1e9
            lines.append(f"{name:36}{dtype:>10}{told:8.2f}{found:10.2f}{told / found:7.2f}")
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
                memory = Memory(decoder=decoder, data=data, model=model, remat=True, looped=True)
                row.append(f"{memory.ppo_update(cfg).total / 1e9:10.1f}")
        lines.append(f"{name:8}" + "".join(row))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measured(options.one, options.precision))
        return
    larger = table()
    text = "\n".join([*compared(), *larger]) + "\n"
    print("\n".join(larger))
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
