"""Training of the reward model beside PyTorch: `python benchmarks/bench_reward.py`.

The peer is a trainer as one writes it with transformers: batches of 8 pairs, every row padded to
the longest, AdamW, clipping, in float32 and under bfloat16 autocast, with torch.compile and
without. All sides start from the same weights and see the same pairs.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import turns

PEER_PAIRS = 8  # in a batch of the peer's
SAMPLE = 400  # posts or pairs over which our batches are planned, as over a run's
FLOPS = (
    "FLOPs     6 N + 12 L T D per token: N weights in the blocks' matrices, L layers, T tokens\n"
    "          in a row, D sizes of the heads together; padded and masked places count as computed"
)


class Part(NamedTuple):
    title: str
    random_tokens: bool = False
    pairs_per_post: int | None = None
    alone: bool = False  # every pair by itself: nothing but its prompt is shared
    batch_pairs: int = PEER_PAIRS  # in a batch of ours


PARTS = {
    "step": Part("8 rows of 256 tokens, nothing shared, no padding", random_tokens=True),
    "pairs": Part("Pairs as they come", alone=True),
    "five": Part("Posts capped at 5 pairs", pairs_per_post=5),
    "all": Part("Every pair of a post", batch_pairs=512),
}


def main() -> None:
    options = turns.options(__doc__, PARTS, turns.SIDES + turns.COMPILED)
    options.add_argument("--max-tokens", type=int, default=512, help="of a prompt with its reply")
    args = options.parse_args()
    if args.side == "prepare":
        prepare(args)
    elif args.side:
        turns.take(SIDES[args.side.split()[0]], args)
    else:
        number = dict.fromkeys(PARTS, args.turns)
        turns.compare(args, number, report, "torch", "transformers")


def report(part: str, folder: Path, answers: dict) -> tuple[str, dict]:
    """Speed, padding, memory and use of the machine; and the speed by name."""
    shape = json.loads((folder / "model" / "config.json").read_text())
    rates = {
        side: statistics.median(a["matrix_rate"] for a in turn) for side, turn in answers.items()
    }
    peaks: dict[str, float] = {}  # of either side
    for side, rate in rates.items():
        name = "float32" if "float32" in side else "bfloat16"
        peaks[name] = max(rate, peaks.get(name, 0.0))
    peak = max(peaks.values())
    width = shape["head_dim"] * shape["num_attention_heads"]
    projections = 2 * width + 2 * shape["head_dim"] * shape["num_key_value_heads"]
    layer = shape["hidden_size"] * (projections + 3 * shape["intermediate_size"])

    def use(answer, seconds="seconds"):
        flops = answer["size"] * (6 * layer + 12 * answer["time"] * width)
        flops *= shape["num_hidden_layers"]
        return 100 * flops / answer[seconds] / peak if seconds in answer else None

    speed = lambda a: a["pairs"] / a["seconds"]  # noqa: E731
    columns = {
        "pairs/s": speed,
        "tokens/s, with padding": lambda a: a["size"] / a["seconds"],
        "padding, %": lambda a: 100 * (1 - a["tokens"] / a["size"]),
        "% of the higher matrix peak": use,
        "the same, forward and backward alone": lambda a: use(a, "gradient_seconds"),
    }
    tokens = json.loads((folder / f"{part}.json").read_text())["tokens"]
    losses = ", ".join(f"{turn[0]['first_loss']:.5f}" for turn in answers.values())

    def planned_speed(answer):
        """In pairs of the whole plan, whose mean length no few batches have."""
        return answer["size"] / answer["seconds"] / tokens[answer["library"]]

    what = "tokens/s" if PARTS[part].random_tokens else "pairs/s"
    speeds = {f"{PARTS[part].title}, {what}": columns["tokens/s, with padding"]}
    if not PARTS[part].random_tokens:
        speeds = {f"{PARTS[part].title}, {what}": planned_speed}
    text = (
        f"## {PARTS[part].title}\n\n{turns.table(answers, columns)}\n\n"
        f"over all planned batches, {tokens['jax']:.0f} (jax) and {tokens['torch']:.0f} (torch) "
        f"tokens a pair; first losses {losses}; matrix peaks: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items())
    )
    return text, speeds


def prepare(args: argparse.Namespace) -> None:
    """Writes the model and the batches of every part, for both sides to read.

    Batches differ in their number of pairs. Those that are trained on are spread over it: the
    middle ones of as many equal parts of the plan as there are turns.
    """
    import numpy as np

    from rlhf_jax.data.preferences import load_preferences
    from rlhf_jax.export.huggingface import export_reward_model

    model = turns.loaded(args)
    export_reward_model(turns.untrained_reward_model(model), model, args.folder / "model")
    frame, source = load_preferences(args.data_dir)
    (args.folder / "about.txt").write_text(
        f"data      {source.name}; {model.name}, {model.origin}\n"
        f"settings  at most {args.max_tokens} tokens; batches of {PEER_PAIRS} pairs; with every "
        f"pair of a post\n          ours holds whole posts, the peer's {PEER_PAIRS} of their pairs"
        f"\n{FLOPS}"
    )
    for name in args.parts:
        random = np.random.default_rng(0)
        plan, shapes = planned(PARTS[name], frame, model.tokenizer, args, random)
        plan.sort(key=lambda group: sum(len(post.pairs) for post in group))
        middles = [(2 * i + 1) * len(plan) // (2 * args.turns) for i in range(args.turns)]
        batches = [written(plan[i], random) for i in random.permutation(middles)]
        work = {"shapes": shapes, "batches": batches, "tokens": tokens_a_pair(plan, shapes, random)}
        (args.folder / f"{name}.json").write_text(json.dumps(work))


def planned(part: Part, frame, tokenizer, args: argparse.Namespace, random) -> tuple:
    """The posts of each of our batches, and the shapes that they are packed in."""
    from rlhf_jax.data import preferences
    from rlhf_jax.reward_model.encoding import EncodedPost, encode_posts, subpost
    from rlhf_jax.reward_model.packing import groups, row_shapes

    if part.random_tokens:
        tokens = random.integers(100, tokenizer.vocab_size, (args.turns, 4, 2, 256))
        post = functools.partial(EncodedPost, "", "", (), pairs=((0, 1),), grades=(), cut_tokens=0)
        return [[post(replies=pair) for pair in turn] for turn in tokens.tolist()], [(8, 256)]
    whole = preferences.posts(frame, max_pairs_per_post=part.pairs_per_post, seed=0)
    posts, _ = encode_posts(whole, tokenizer, max_tokens=args.max_tokens)
    if part.alone:
        posts = [subpost(post, [i]) for post in posts for i in range(len(post.pairs))]
    order = random.permutation(len(posts))[:SAMPLE]
    cfg = reward_config(args)
    limits = {"batch_rows": cfg.batch_rows, "max_tokens": cfg.max_tokens}
    plan = groups(posts, batch_pairs=part.batch_pairs, order=order, **limits)
    return plan, row_shapes(plan, max_tokens=cfg.max_tokens)


def tokens_a_pair(plan, shapes, random) -> dict[str, float]:
    """Tokens that each side computes for a pair, padding included, over the whole plan."""
    from rlhf_jax.reward_model.packing import pack

    rows, packed = [], 0
    for group in plan:
        pairs = written(group, random, most=None)["pairs"]
        packed += pack(group, shapes=shapes, batch_pairs=len(pairs), pad=0).tokens.size
        rows += [max(map(len, pair)) for pair in pairs]
    random.shuffle(rows)
    batches = [rows[i : i + PEER_PAIRS] for i in range(0, len(rows), PEER_PAIRS)]
    padded = sum(2 * len(batch) * max(batch) for batch in batches)
    return {"jax": packed / len(rows), "torch": padded / len(rows)}


def written(group, random, most: int | None = PEER_PAIRS) -> dict[str, list]:
    """The posts of one of our batches, and as many of their pairs as the peer takes at once."""
    pairs = [
        ((*post.prompt, *post.replies[a]), (*post.prompt, *post.replies[b]))
        for post in group
        for a, b in post.pairs
    ]
    taken = random.permutation(len(pairs))[:most]
    return {"posts": list(map(dataclasses.asdict, group)), "pairs": [pairs[i] for i in taken]}


def reward_config(args: argparse.Namespace):
    """The protocol's settings."""
    from rlhf_jax.config import RewardConfig

    return RewardConfig(max_tokens=args.max_tokens)


def jax_side(args: argparse.Namespace):
    """The library's compiled step on packed posts."""
    import jax
    from flax import nnx

    from rlhf_jax.optimization.optimizer import decayed_adam, optimizer_for
    from rlhf_jax.optimization.state import initial_state
    from rlhf_jax.reward_model import model as reward_models
    from rlhf_jax.reward_model import training as reward_training
    from rlhf_jax.reward_model.encoding import EncodedPost
    from rlhf_jax.reward_model.packing import pack

    name = args.parts[0]
    work = json.loads((args.folder / f"{name}.json").read_text())
    group = [EncodedPost(**post) for post in work["batches"][args.turn]["posts"]]
    cfg, model = reward_config(args), turns.loaded(args)
    layout = {"batch_pairs": PARTS[name].batch_pairs, "pad": model.tokenizer.pad}
    layout["shapes"] = [tuple(shape) for shape in work["shapes"]]
    definition, trainable, frozen = reward_models.initial(model, cfg.seed)
    adamw = decayed_adam(cfg.learning_rate, cfg.weight_decay)
    optimizer = optimizer_for({"all": adamw}, lambda path: "all", clip_norm=cfg.clip_norm)
    state = initial_state(trainable, optimizer)

    def step() -> dict:
        nonlocal state
        began = time.perf_counter()
        batch = reward_training.placed(pack(group, **layout))
        state, metrics = reward_training.update(
            state, frozen, batch, definition=definition, optimizer=optimizer, cfg=cfg
        )
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        rows, length = batch.tokens.shape
        return {
            "seconds": seconds, "size": rows * length, "time": length,
            "tokens": int((batch.documents >= 0).sum()), "pairs": int(batch.weight.sum()),
            "loss": float(metrics["loss"]),
        }  # fmt: skip

    @jax.jit
    def gradients(trainable, batch):
        def loss(trainable):
            scores = nnx.merge(definition, trainable, frozen).pairs(batch)
            return reward_training.pair_loss(scores, batch, cfg)[0]

        return jax.grad(loss)(trainable)

    def timed_gradients() -> dict:
        batch = reward_training.placed(pack(group, **layout))
        began = time.perf_counter()
        jax.block_until_ready(gradients(state.trainable, batch))
        return {"gradient_seconds": time.perf_counter() - began}

    version = f"jax {jax.__version__} on {jax.devices()[0].platform}"
    answer = {"version": version, "first_loss": step()["loss"]} | step()
    if PARTS[name].random_tokens:
        timed_gradients()  # compiles
        answer |= timed_gradients()
    rate = turns.jax_matrix_rate(turns.precision(args))
    return answer | {"library": "jax", "matrix_rate": rate}


def torch_side(args: argparse.Namespace):
    """The same step as one writes it with transformers."""
    import torch
    import transformers
    from torch.nn.functional import margin_ranking_loss

    torch.set_num_threads(os.cpu_count())
    work = json.loads((args.folder / f"{args.parts[0]}.json").read_text())
    pairs = work["batches"][args.turn]["pairs"]
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        args.folder / "model", dtype=torch.float32, use_cache=False
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    half = turns.precision(args) == "bfloat16"
    if args.side in turns.COMPILED:
        model.compile()

    def step() -> dict:
        began = time.perf_counter()
        rows = [torch.tensor(row) for column in zip(*pairs, strict=True) for row in column]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, model.config.pad_token_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores = model(input_ids=tokens, attention_mask=mask).logits[:, 0].float()
        chosen, rejected = scores.chunk(2)
        loss = margin_ranking_loss(chosen, rejected, torch.ones_like(chosen), margin=1.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds, "size": tokens.numel(), "time": tokens.shape[1],
            "tokens": int(mask.sum()), "pairs": len(pairs), "loss": loss.item(),
        }  # fmt: skip

    one = torch.ones(turns.MATRIX, turns.MATRIX, dtype=torch.bfloat16 if half else torch.float32)
    version = f"torch {torch.__version__}, transformers {transformers.__version__} on cpu"
    answer = {"version": version, "first_loss": step()["loss"]} | step()
    return answer | {"library": "torch", "matrix_rate": turns.matrix_rate(lambda: one @ one)}


SIDES = {"prepare": prepare, "jax": jax_side, "torch": torch_side}

if __name__ == "__main__":
    main()
