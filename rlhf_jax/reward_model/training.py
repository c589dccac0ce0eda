"""Training of the reward model on pairs; it is frozen afterwards."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.devices import (
    data_size,
    kept,
    on_host,
    on_mesh,
    over_devices,
    replicated,
    sharded,
)
from experiment_runs.process import peak_memory_gb, progress
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_jax.config import RewardConfig
from rlhf_jax.data.dialogues import Conversation
from rlhf_jax.data.near_duplicates import near_duplicate_posts
from rlhf_jax.data.preferences import Post
from rlhf_jax.language_model import sharding
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.optimizer import decayed_adam, linear_schedule, optimizer_for
from rlhf_jax.optimization.state import TrainState, check_finite, initial_state, parameter_counts
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.pretrained.tokenizer import Tokenizer
from rlhf_jax.reward_model.encoding import EncodedPost, Parts, encode_parts
from rlhf_jax.reward_model.model import (
    FrozenRewardModel,
    check_references,
    initial,
    scale_on_reference,
)
from rlhf_jax.reward_model.packing import SHAPES, PairBatch, groups, pack, row_shapes

DROPOUT = 1  # the random stream of a run


def train_on_posts(
    run: Run,
    cfg: RewardConfig,
    pretrained: Pretrained,
    parts: Mapping[str, Sequence[Post]],
    reference_prompts: Sequence[Conversation],
) -> None:
    """`train` on the "train", "validation" and "test" posts as text."""
    read = encode_parts(parts, pretrained.tokenizer, max_tokens=cfg.max_tokens)
    for name in ("validation", "test"):
        same = near_duplicate_posts(parts[name], parts["train"])
        fit = dataclasses.replace(read[name][1], near_duplicates=same)
        read[name] = read[name][0], fit
    train(run, cfg, pretrained, read, reference_prompts)


@on_mesh
def train(
    run: Run,
    cfg: RewardConfig,
    pretrained: Pretrained,
    parts: Parts,
    reference_prompts: Sequence[Conversation],
) -> None:
    """Trains, keeps the best weights by validation loss and evaluates them on the test pairs.

    Args:
      run: where to log; resumes from its checkpoints.
      cfg: the configuration.
      pretrained: the model to start from.
      parts: encoded "train", "validation" and "test" posts.
      reference_prompts: the pretrained policy's responses to these centre and scale the reward.

    Raises:
      UserError: there are too few prompts for the reward's scale, or the model cannot be divided
        over the devices.
    """
    check_references(reference_prompts, cfg)
    sharding.check(pretrained.config)
    pad = pretrained.tokenizer.pad
    plan = batch_plan(parts["train"][0], cfg)
    shapes = shapes_of(plan, cfg)
    validation = [batch for _, batch in batches(parts["validation"][0], cfg, pad)]
    definition, trainable, frozen = initial(pretrained, cfg.seed, cfg.lora)
    schedule = linear_schedule(cfg.learning_rate, len(plan), cfg.warmup_fraction)
    adamw = decayed_adam(schedule, cfg.weight_decay)
    optimizer = optimizer_for({"all": adamw}, lambda path: "all", clip_norm=cfg.clip_norm)
    state, frozen = initial_state(trainable, optimizer), sharded(frozen, RULES)
    static = {"definition": definition, "cfg": cfg}
    dropout = jax.random.fold_in(jax.random.key(cfg.seed), DROPOUT)
    checkpoints = Checkpoints(run.checkpoints, run.identity)
    start, best = 0, {"loss": math.inf, "step": -1}
    if restored := checkpoints.restore(state):
        start, state, best = restored
    run.rewind(start or -1)
    if start == 0:
        keep_inputs(run, parts["train"][0], pretrained.tokenizer)
    every = max(1, len(plan) // (cfg.epochs * cfg.evaluations_per_epoch))
    bar = progress(label="reward model", total=len(plan), initial=start)
    for step in range(start, len(plan)):
        began = time.perf_counter()
        batch = placed(pack(plan[step], shapes=shapes, batch_pairs=cfg.batch_pairs, pad=pad))
        dropout_key = jax.random.fold_in(dropout, step) if cfg.lora else None
        state, metrics = update(
            state, frozen, batch, dropout_key=dropout_key, optimizer=optimizer, **static
        )
        row = {name: float(value) for name, value in metrics.items()}
        check_finite(step + 1, loss=row["loss"], gradient=row["gradient_norm"])
        row |= cost(batch, time.perf_counter() - began)
        if (step + 1) % every == 0 or step + 1 == len(plan):
            scored = measure(state.trainable, frozen, validation, **static)
            check_finite(step + 1, validation_loss=scored["loss"])
            row |= {f"validation_{name}": value for name, value in scored.items()}
            if scored["loss"] < best["loss"]:
                best = {"loss": scored["loss"], "step": step + 1}
                save_weights(run.checkpoints / "best", state.trainable, step=step + 1)
        epoch = (step + 1) * cfg.epochs / len(plan)
        run.log(step=step + 1, epoch=epoch, learning_rate=float(schedule(step)), **row)
        checkpoints.maybe_save(step + 1, state, best)
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}")
    bar.close()
    checkpoints.close()
    del state
    run.finish(
        best=best,
        steps=len(plan),
        **evaluated(
            run, cfg, pretrained, parts, reference_prompts, (definition, trainable, frozen)
        ),
    )


def evaluated(
    run: Run,
    cfg: RewardConfig,
    pretrained: Pretrained,
    parts: Parts,
    reference_prompts: Sequence[Conversation],
    untrained: tuple[nnx.GraphDef, nnx.State, nnx.State],
) -> dict[str, Any]:
    """The best weights on the held-out pairs, beside baselines, and the scale of their reward."""
    # With it comes scikit-learn, which takes longer to import than JAX and which few commands need.
    from rlhf_jax.reward_model.held_out import assess_and_keep

    definition, trainable, frozen = untrained
    trainable = sharded(trainable, RULES)
    pad = pretrained.tokenizer.pad
    trained = load_weights(run.checkpoints / "best", trainable)
    held_out = {name: batches(parts[name][0], cfg, pad) for name in ("validation", "test")}
    before = score_pairs(definition, trainable, frozen, held_out["test"])
    after = {name: score_pairs(definition, trained, frozen, own) for name, own in held_out.items()}
    posts = {name: [post for group, _ in own for post in group] for name, own in held_out.items()}
    posts["train"] = parts["train"][0]
    raw = FrozenRewardModel(*nnx.split(nnx.merge(definition, trained, frozen)))
    return {
        "scale": scale_on_reference(raw, pretrained, reference_prompts, cfg),
        "decoder": dataclasses.asdict(pretrained.config),
        "parameters": parameter_counts(trained),
        **assess_and_keep(run, posts, after, before, pretrained.tokenizer, seed=cfg.seed),
        **account(parts, run),
    }


def batch_plan(posts: Sequence[EncodedPost], cfg: RewardConfig) -> list[list[EncodedPost]]:
    """The posts of every step of the run, in an order of its own for every epoch."""
    orders = [
        np.random.default_rng([cfg.seed, epoch]).permutation(len(posts))
        for epoch in range(cfg.epochs)
    ]
    return [group for order in orders for group in groups(posts, **limits(cfg), order=order)]


def batches(
    posts: Sequence[EncodedPost], cfg: RewardConfig, pad: int
) -> list[tuple[list[EncodedPost], PairBatch]]:
    """All pairs of the posts as they come: the posts of every batch, and the batch."""
    plan = groups(posts, **limits(cfg))
    shapes = shapes_of(plan, cfg)
    packed = (pack(group, shapes=shapes, batch_pairs=cfg.batch_pairs, pad=pad) for group in plan)
    return [(group, placed(batch)) for group, batch in zip(plan, packed, strict=True)]


def placed(batch: PairBatch) -> PairBatch:
    """The rows divided over the devices; what points into them is on every one."""
    rows = ("tokens", "documents", "segments", "positions")
    own = {name: over_devices(getattr(batch, name)) for name in rows}
    return replicated(batch._replace(**dict.fromkeys(rows)))._replace(**own)


def shapes_of(plan: Sequence[Sequence[EncodedPost]], cfg: RewardConfig) -> list[tuple[int, int]]:
    """The shapes in which the batches of a plan are laid out on this machine."""
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    return row_shapes(plan, max_tokens=cfg.max_tokens, devices=data_size(), **SHAPES[kind])


def limits(cfg: RewardConfig) -> dict[str, int]:
    """What bounds a batch."""
    names = ("batch_pairs", "batch_rows", "max_tokens")
    return {name: getattr(cfg, name) for name in names}


def cost(batch: PairBatch, seconds: float) -> dict[str, float]:
    """What a step took."""
    tokens = int((on_host(batch.documents) >= 0).sum())
    padding = 1 - tokens / batch.tokens.size
    memory = peak_memory_gb()
    return {"seconds": seconds, "tokens": tokens, "padding": padding, "peak_memory_gb": memory}


def keep_inputs(run: Run, posts: Sequence[EncodedPost], tokenizer: Tokenizer) -> None:
    """The first pairs exactly as they go into the model, special tokens written out."""
    for post in posts[:6]:
        chosen, rejected = (
            tokenizer.decode_exact((*post.prompt, *post.replies[i])) for i in post.pairs[0]
        )
        run.sample(step=0, post=post.post_id, input_chosen=chosen, input_rejected=rejected)


@functools.partial(
    jax.jit, static_argnames=("definition", "optimizer", "cfg"), donate_argnames="state"
)
def update(
    state: TrainState,
    frozen: nnx.State,
    batch: PairBatch,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    cfg: RewardConfig,
    dropout_key: Array | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on one batch of pairs; the key is for the dropout of adapters."""

    def loss_fn(trainable):
        model = nnx.merge(definition, trainable, frozen)
        return pair_loss(model.pairs(batch, dropout_key), batch, cfg)

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    return kept(TrainState(trainable, opt_state, state.step + 1), RULES), metrics


def pair_loss(
    scores: Float[Array, "replies"], batch: PairBatch, cfg: RewardConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean loss over the real pairs of a batch; accuracy counts a tie as half."""
    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    if cfg.loss == "hinge":
        losses = objectives.margin_ranking_loss(chosen, rejected, margin=cfg.margin)
    else:
        losses = objectives.logistic_loss(chosen, rejected)
    real = batch.weight > 0
    correct = (1 + jnp.sign(chosen - rejected)) / 2
    loss = objectives.masked_mean(losses, real)
    return loss, {
        "loss": loss,
        "accuracy": objectives.masked_mean(correct, real),
        "difference": objectives.masked_mean(chosen - rejected, real),
        "pairs": real.sum(),
    }


@functools.partial(jax.jit, static_argnames=("definition",))
def pair_scores(trainable, frozen, batch: PairBatch, *, definition) -> Float[Array, "replies"]:
    """Raw scores of the replies of one batch."""
    return nnx.merge(definition, trainable, frozen).pairs(batch)


def measure(
    trainable: nnx.State,
    frozen: nnx.State,
    batches: Sequence[PairBatch],
    *,
    definition: nnx.GraphDef,
    cfg: RewardConfig,
) -> dict[str, float]:
    """Loss and accuracy over all pairs of some batches."""
    totals = {"loss": 0.0, "accuracy": 0.0}
    count = 0.0
    for batch in batches:
        scores = pair_scores(trainable, frozen, batch, definition=definition)
        _, metrics = pair_loss(scores, batch, cfg)
        pairs = float(metrics["pairs"])
        totals = {name: total + pairs * float(metrics[name]) for name, total in totals.items()}
        count += pairs
    return {name: total / count for name, total in totals.items()}


def score_pairs(
    definition: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    batches: Sequence[tuple[list[EncodedPost], PairBatch]],
) -> dict[str, Float[np.ndarray, "pairs"]]:
    """Raw scores of the chosen and rejected reply of every pair, in the order of the batches."""
    scored: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": []}
    for _, batch in progress(batches, label="scoring pairs"):
        scores = on_host(pair_scores(trainable, frozen, batch, definition=definition))
        real = np.asarray(batch.weight) > 0
        scored["chosen"].append(scores[np.asarray(batch.chosen)[real]])
        scored["rejected"].append(scores[np.asarray(batch.rejected)[real]])
    return {name: np.concatenate(columns) for name, columns in scored.items()}


def account(parts: Parts, run: Run) -> dict[str, object]:
    """How many posts and pairs were used, what was cut, and how fast it went."""
    metrics = run.metrics()
    settled = metrics[metrics["seconds"] < 3 * metrics["seconds"].median()]  # without compilation
    return {
        "posts": {name: len(posts) for name, (posts, _) in parts.items()},
        "pairs": {name: sum(len(p.pairs) for p in posts) for name, (posts, _) in parts.items()},
        "fit": {name: vars(fit) for name, (_, fit) in parts.items()},
        "padding": float(metrics["padding"].mean()),
        "tokens_per_second": float(settled["tokens"].sum() / settled["seconds"].sum()),
        "pairs_per_second": float(settled["pairs"].sum() / settled["seconds"].sum()),
        "peak_memory_gb": float(metrics["peak_memory_gb"].max()),
        "train_seconds": float(metrics["seconds"].sum()),
    }
