"""Seconds and memory of a PPO step beside PyTorch's: `python benchmarks/bench_ppo.py`.

One peer is the last TRL with a PPO trainer, as it comes: a policy, a value model that is trained
whole, a reward model, and a reference unless the policy has adapters; with `bf16=True` and without.
All sides start from the same weights and see the same prompts. What TRL lets one choose is chosen
in its favour: no gradient checkpointing, and it generates and scores a whole batch at once. The
other is a step as one writes it for speed with transformers (`transformers_ppo.py`). Generation is
transformers' `generate`, with weights in bfloat16 or in float32.
"""

import argparse
import dataclasses
import json
import math
import operator
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import turns

LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}


class Part(NamedTuple):
    work: str
    peer: str
    lora: dict | None = None

    @property
    def title(self) -> str:
        return f"{self.work}, beside {self.peer}"


PARTS = {
    "full": Part("PPO, every weight", "TRL's"),
    "lora": Part("PPO, LoRA", "TRL's", LORA),
    "full-transformers": Part("PPO, every weight", "one written with transformers"),
    "lora-transformers": Part("PPO, LoRA", "one written with transformers", LORA),
    "generation": Part("Generation, no response ends early", "transformers' generate"),
}
GENERATION_TURNS = 3  # of more than eight thousand tokens each
PHASES = ("sampling", "scoring", "update")


def main() -> None:
    options = turns.options(__doc__, PARTS)
    options.add_argument("--batch", type=int, default=8, help="episodes of a step")
    options.add_argument("--forward-batch", type=int, default=4)
    options.add_argument("--prompt-tokens", type=int, default=48)
    options.add_argument("--response-tokens", type=int, default=32)
    options.add_argument("--inner-epochs", type=int, default=2)
    options.add_argument(
        "--generation", type=int, nargs=3, default=[64, 128, 128],
        help="prompts, tokens of each prompt and of each response",
    )  # fmt: skip
    args = options.parse_args()
    if args.side == "prepare":
        prepare(args)
    elif args.side:
        turns.take(SIDES[args.side.split()[0]], args)
    else:
        number = dict.fromkeys(PARTS, args.turns)
        number["generation"] = min(args.turns, GENERATION_TURNS)
        turns.compare(args, number, report, "torch", "transformers", "trl", "peft")


def report(part: str, folder: Path, answers: dict) -> tuple[str, dict]:
    """Seconds or speed and memory; and the speed by name."""
    if part == "generation":
        columns = speeds = {
            "new tokens/s": lambda a: a["tokens"] / a["seconds"],
            "after the first, new tokens/s": lambda a: (
                (a["tokens"] - a["prompts"]) / (a["seconds"] - a["first"])
            ),
        }
        columns = columns | {
            "responses that end early, % of the tokens": lambda a: (
                100 * a["share"] if "share" in a else None
            ),
            "% of the time after the first": lambda a: (
                100 * (a["early"] - a["first"]) / (a["seconds"] - a["first"])
                if "early" in a
                else None
            ),
        }
        bounds = {
            side: statistics.median(a["tokens"] / a["bound"] for a in turn)
            for side, turn in answers.items()
            if side.startswith("jax")
        }
        said = "matrix products alone at the peak: " + ", ".join(
            f"{side} {bound:.0f} new tokens/s" for side, bound in bounds.items()
        )
        speeds = {f"{PARTS[part].work}, {what}": speed for what, speed in speeds.items()}
    else:
        columns = {"seconds a step": lambda a: sum(a.get(phase, 0) for phase in PHASES)}
        columns |= {phase: operator.methodcaller("get", phase) for phase in PHASES}
        speeds = {f"{PARTS[part].title}, steps/s": lambda a: 1 / columns["seconds a step"](a)}
        memory = {side: turns.memory(turn) for side, turn in answers.items()}
        said = "jax scores within its update; peak memory: " + ", ".join(
            f"{side} {gb:.2f} GB" for side, gb in memory.items()
        )
    return f"## {PARTS[part].title}\n\n{turns.table(answers, columns)}\n\n{said}", speeds


def prepare(args: argparse.Namespace) -> None:
    """Writes policy, reward model and prompts for both sides to read."""
    from flax import nnx

    from rlhf_jax.data.prompts import load_prompts
    from rlhf_jax.export.huggingface import export_policy, export_reward_model
    from rlhf_jax.pretrained.prompt_rows import prompt_rows

    model = turns.loaded(args)
    decoder = nnx.merge(model.definition, model.state)
    export_policy(decoder, model, args.folder / "policy", {"do_sample": True})
    export_reward_model(turns.untrained_reward_model(model), model, args.folder / "reward")
    prompts, source = load_prompts(args.data_dir)
    texts = [prompt.text for prompt in prompts[: args.batch * 2 * args.turns]]
    rows, _, _ = prompt_rows(texts, model.tokenizer, length=args.prompt_tokens)
    (args.folder / "prompts.json").write_text(json.dumps(rows.tolist()))
    (args.folder / "about.txt").write_text(
        f"data      {source.name}; {model.name}, {model.origin}\n"
        f"settings  steps of {args.batch} episodes in forward batches of {args.forward_batch}, "
        f"{rows.shape[1]} + {args.response_tokens} tokens, {args.inner_epochs} inner epochs"
    )


def jax_side(args: argparse.Namespace):
    """The library's step; scoring and inner epochs are one program."""
    import jax
    import numpy as np

    from rlhf_jax.config import LoRAConfig, PPOConfig
    from rlhf_jax.export.foreign_reward_model import load_reward_model
    from rlhf_jax.language_model.decoder import for_products
    from rlhf_jax.language_model.sampling import draw_keys
    from rlhf_jax.optimization.state import compiled, initial_state
    from rlhf_jax.ppo import actor_critic
    from rlhf_jax.ppo import training as ppo_training
    from rlhf_jax.ppo.rollout import Frozen, Static, draw
    from rlhf_jax.ppo.update import update

    model, lora = turns.loaded(args), PARTS[args.parts[0]].lora
    version = {"version": f"jax {jax.__version__} on {jax.devices()[0].platform}"}
    if args.parts == ["generation"]:
        return version | jax_generation(model, args)
    rows = np.array(prompts_of(args), np.int32)
    cfg = PPOConfig(
        lora=LoRAConfig() if lora else None, batch=args.batch,
        forward_batch=args.forward_batch, passes=1, inner_epochs=args.inner_epochs,
        prompts=len(rows), prompt_tokens=rows.shape[1], response_tokens=args.response_tokens,
        approx_kl_limit=math.inf,  # the peer has none: all inner epochs run
    )  # fmt: skip
    dtype = turns.precision(args)
    reward_model = load_reward_model(
        args.folder / "reward", model.tokenizer, dtype=dtype
    ).for_products()
    fixed = for_products(model.state, model.config.products)
    base = dataclasses.replace(model, state=fixed) if cfg.lora else model
    tuned = actor_critic.build(base, cfg.lora, seed=0)
    optimizer = ppo_training.ppo_optimizer(cfg)
    state = initial_state(tuned.trainable, optimizer)
    frozen = Frozen(tuned.frozen, fixed, {"reward": reward_model.state})
    static = Static(
        tuned.definition, model.definition, (("reward", 1.0, reward_model.definition),),
        optimizer, cfg, model.tokenizer.ends,
    )  # fmt: skip

    program = None

    def step(prompts) -> turns.Answer:
        nonlocal state, program
        batch = (prompts, prompts != model.tokenizer.pad)
        draws, dropout = jax.random.split(jax.random.key(int(state.step)))
        began = time.perf_counter()
        actor = actor_critic.Policy(tuned.definition, state.trainable, frozen.policy)
        keys = draw_keys(draws, range(len(prompts)))
        responses = jax.block_until_ready(draw(actor, batch, keys, cfg, model.tokenizer))
        sampled = time.perf_counter()
        arguments = (state, frozen, *batch, responses, {}, cfg.kl_weight, dropout)
        program = program or compiled(update, *arguments, static=static)
        state, metrics, _ = jax.block_until_ready(program(*arguments))
        finished = time.perf_counter()
        assert metrics["inner_epochs"] == cfg.inner_epochs
        return {"sampling": sampled - began, "update": finished - sampled}

    first, second = np.split(rows, 2)
    step(first)
    return version | step(second)


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """What a turn works on: two batches, of which the first warms up."""
    rows = json.loads((args.folder / "prompts.json").read_text())
    return rows[2 * args.batch * args.turn :][: 2 * args.batch]


def jax_generation(model, args: argparse.Namespace) -> turns.Answer:
    """Sampling in which no response ends early, and one in which they end at a quarter of it."""
    import jax
    import numpy as np

    from rlhf_jax.language_model.sampling import draw_keys, sample

    number, width, longest = args.generation
    prompts = np.random.default_rng(0).integers(100, model.tokenizer.vocab_size, (number, width))
    inputs = (prompts.astype(np.int32), np.ones((number, width), bool))
    settings = {"decoder_def": model.definition, "pad": 0}

    def sampled(length: int, end):
        keys = draw_keys(jax.random.key(length), range(len(prompts)))
        return sample(model.state, *inputs, keys, 1.0, length=length, end=end, **settings)

    def seconds(length: int, end) -> float:
        began = time.perf_counter()
        jax.block_until_ready(sampled(length, end))
        return time.perf_counter() - began

    endless = sampled(longest, -1)
    assert endless.mask.all()
    seconds(1, -1)  # compiles
    measured = {"first": seconds(1, -1), "seconds": seconds(longest, -1)}
    measured["memory"] = turns.peak_memory_gb()
    ends = ending(np.asarray(endless.tokens))
    measured["share"] = float(sampled(longest, ends).mask.mean())
    measured["early"] = seconds(longest, ends)
    bound = generation_flops(model, args) / turns.jax_matrix_rate(turns.precision(args))
    return measured | {"bound": bound, "prompts": number, "tokens": number * longest}


def ending(tokens) -> tuple[int, ...]:
    """Tokens that end these responses at a quarter on average; drawn from those in them."""
    import numpy as np

    words = np.random.default_rng(0).permutation(np.unique(tokens))
    for count in range(1, len(words)):
        ends = np.isin(tokens, words[:count])
        lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, tokens.shape[1])
        if lengths.mean() <= tokens.shape[1] / 4:
            break
    return tuple(words[:count].tolist())


def generation_flops(model, args: argparse.Namespace) -> float:
    """Of the matrix products: prompts and responses pass the blocks, responses the vocabulary."""
    import jax

    vocabulary = model.config.vocab_size * model.config.embed_dim
    matrices = sum(leaf.size for leaf in jax.tree.leaves(model.state) if leaf.ndim == 2)
    prompts, width, length = args.generation
    return 2 * prompts * ((width + length) * (matrices - vocabulary) + length * vocabulary)


def torch_side(args: argparse.Namespace):
    """Two steps of the peer, of which the second is measured."""
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(os.cpu_count())
    half = turns.precision(args) == "bfloat16"
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    version = {"version": ", ".join(versions)}

    def read(kind: str, name: str, dtype=torch.float32):
        kind = getattr(transformers, f"AutoModelFor{kind}")
        return kind.from_pretrained(args.folder / name, dtype=dtype)

    part, lora = args.parts[0], PARTS[args.parts[0]].lora
    if part == "generation":
        model = read("CausalLM", "policy", torch.bfloat16 if half else torch.float32)
        return version | torch_generation(model, args)
    rows = prompts_of(args)
    if part.endswith("transformers"):
        import transformers_ppo

        return version | transformers_ppo.measure(args, rows, lora)
    from datasets import Dataset
    from trl.experimental import ppo

    settings = ppo.PPOConfig(
        output_dir=str(args.folder / "trl"), use_cpu=True, bf16=half, report_to="none",
        save_strategy="no", num_sample_generations=0, gradient_checkpointing=False,
        per_device_train_batch_size=args.forward_batch,
        gradient_accumulation_steps=args.batch // args.forward_batch,
        local_rollout_forward_batch_size=args.batch, num_ppo_epochs=args.inner_epochs,
        total_episodes=len(rows), response_length=args.response_tokens, temperature=1.0,
        stop_token="eos", missing_eos_penalty=1.0, learning_rate=1e-5, adam_epsilon=1e-5,
    )  # fmt: skip
    phases = timed_phases()
    trainer = ppo.PPOTrainer(
        settings,
        processing_class=transformers.AutoTokenizer.from_pretrained(args.folder / "policy"),
        model=read("CausalLM", "policy"),
        ref_model=None if lora else read("CausalLM", "policy"),
        reward_model=read("SequenceClassification", "reward"),
        value_model=read("SequenceClassification", "reward"),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        peft_config=peft.LoraConfig(**lora, task_type="CAUSAL_LM") if lora else None,
        callbacks=[phases],
    )
    trainer.train()
    return version | phases.seconds[1]


def timed_phases():
    """A callback with the seconds of each phase of each step.

    Sampling ends with TRL's `batch_generation`, scoring with the first pass that keeps gradients.
    """
    import torch
    import transformers
    from trl.experimental.ppo import ppo_trainer

    marks: dict[str, float] = {}
    generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def marked_generation(*args, **kwargs):
        result = generation(*args, **kwargs)
        marks["sampled"] = time.perf_counter()
        return result

    def marked_forward(*args, **kwargs):
        if torch.is_grad_enabled():
            marks.setdefault("scored", time.perf_counter())
        return forward(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward = marked_generation, marked_forward

    class Phases(transformers.TrainerCallback):
        seconds: list[turns.Answer] = []

        def on_train_begin(self, *args, **kwargs):
            marks["began"] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            finished = time.perf_counter()
            self.seconds.append({
                "sampling": marks["sampled"] - marks["began"],
                "scoring": marks["scored"] - marks["sampled"],
                "update": finished - marks["scored"],
            })  # fmt: skip
            marks.clear()
            marks["began"] = time.perf_counter()

    return Phases()


def torch_generation(model, args: argparse.Namespace) -> turns.Answer:
    """`generate` in which no response ends early."""
    import torch

    model.generation_config.eos_token_id = None
    number, width, longest = args.generation
    prompts = torch.randint(100, model.config.vocab_size, (number, width))

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            whole = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            )  # fmt: skip
        assert whole.shape == (number, width + tokens)
        return time.perf_counter() - began

    seconds(1)
    measured = {"first": seconds(1), "seconds": seconds(longest)}
    return measured | {"prompts": number, "tokens": number * longest}


SIDES = {"prepare": prepare, "jax": jax_side, "torch": torch_side}

if __name__ == "__main__":
    main()
