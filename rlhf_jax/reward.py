"""The reward model: a decoder with a scalar head, trained on pairs, frozen afterwards."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reporting.runs import Run, progress
from rlhf_jax import objectives
from rlhf_jax.attention import block_mask
from rlhf_jax.batch import EncodedPost, Fit, PairBatch, groups, pack, prompt_rows
from rlhf_jax.config import RewardConfig
from rlhf_jax.generation import Responses, sample
from rlhf_jax.model import Decoder, Linear
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.statistics import bootstrap, by_group
from rlhf_jax.tokenizer import Tokenizer
from rlhf_jax.training import (
    Checkpoints,
    TrainState,
    check_finite,
    initial_state,
    linear_schedule,
    load_weights,
    optimizer_for,
    over_devices,
    parameter_counts,
    peak_memory_gb,
    replicated,
    save_weights,
)


class RewardScale(nnx.Variable):
    """Centre and gain of the reward; set after training, never trained."""


class RewardModel(nnx.Module):
    """A scalar for a whole response, read where its end token stands."""

    def __init__(self, decoder: Decoder, *, rngs: nnx.Rngs):
        embed = decoder.cfg.embed_dim
        self.decoder = decoder
        self.score = Linear(embed, 1, rngs=rngs)
        # N(0, 1 / (d + 1)), as in Stiennon et al. (2020) and N+
        self.score.kernel[...] = jax.random.normal(rngs.params(), (embed, 1)) / math.sqrt(embed + 1)
        self.offset = RewardScale(jnp.zeros(()))
        self.gain = RewardScale(jnp.ones(()))

    def scores(self, hidden: Float[Array, "items embed"]) -> Float[Array, "items"]:
        """Raw scores, float32."""
        return self.score(hidden.astype(jnp.float32))[:, 0]

    def pairs(self, batch: PairBatch) -> Float[Array, "replies"]:
        """Raw score of every reply of packed posts."""
        mask = block_mask(batch.documents, batch.segments)
        hidden = self.decoder(batch.tokens, batch.positions, mask)
        return self.scores(hidden[batch.end_row, batch.end_column])

    def __call__(
        self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
    ) -> Float[Array, "batch"]:
        """Normalised reward of prompts with one response each, read at the last real token.

        Args:
          tokens: prompt and response in the template, padded on either side or both.
          mask: True on real tokens.
        """
        documents = jnp.where(mask, 0, -1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden = self.decoder(tokens, positions, block_mask(documents, jnp.zeros_like(documents)))
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        raw = self.scores(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
        return (raw - self.offset[...]) * self.gain[...]


class Judge(NamedTuple):
    """A frozen reward model: the static half and its arrays."""

    definition: nnx.GraphDef
    state: nnx.State


def initial(pretrained: Pretrained, seed: int) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(definition, trainable parameters, the reward's scale) before training."""
    decoder = nnx.merge(pretrained.definition, pretrained.state)
    model = RewardModel(decoder, rngs=nnx.Rngs(seed))
    return nnx.split(model, nnx.Param, RewardScale)


def train(
    run: Run,
    cfg: RewardConfig,
    pretrained: Pretrained,
    parts: dict[str, tuple[list[EncodedPost], Fit]],
    reference_prompts: Sequence[str],
) -> None:
    """Trains, keeps the best weights by validation loss and evaluates them on the test pairs.

    Args:
      run: where to log; resumes from its checkpoints.
      cfg: the configuration.
      pretrained: the model to start from.
      parts: encoded "train", "validation" and "test" posts.
      reference_prompts: the pretrained policy's responses to these centre and scale the reward.
    """
    shape = {"batch_pairs": cfg.batch_pairs, "max_tokens": cfg.max_tokens}
    shape["pad"] = pretrained.tokenizer.pad
    posts = parts["train"][0]
    plan = [
        (epoch, group)
        for epoch in range(cfg.epochs)
        for group in groups(
            posts,
            batch_pairs=cfg.batch_pairs,
            order=np.random.default_rng([cfg.seed, epoch]).permutation(len(posts)),
        )
    ]
    validation = [
        over_devices(pack(group, **shape))
        for group in groups(parts["validation"][0], batch_pairs=cfg.batch_pairs)
    ]
    definition, trainable, scale = initial(pretrained, cfg.seed)
    schedule = linear_schedule(cfg.learning_rate, len(plan), cfg.warmup_fraction)
    optimizer = optimizer_for(
        {"all": optax.adamw(schedule, weight_decay=cfg.weight_decay)},
        lambda path: "all",
        clip_norm=cfg.clip_norm,
    )
    state, scale = initial_state(trainable, optimizer), replicated(scale)
    static = {"definition": definition, "cfg": cfg}
    checkpoints = Checkpoints(run.checkpoints)
    start, best = 0, {"loss": math.inf, "step": -1}
    if restored := checkpoints.restore(state):
        start, state, best = restored
    run.rewind(start)
    if start == 0:
        keep_inputs(run, posts, pretrained.tokenizer)
    every = max(1, len(plan) // (cfg.epochs * cfg.evaluations_per_epoch))
    bar = progress(label="reward model", total=len(plan), initial=start)
    for step in range(start, len(plan)):
        epoch, group = plan[step]
        began = time.perf_counter()
        batch = over_devices(pack(group, **shape))
        state, metrics = update(state, scale, batch, optimizer=optimizer, **static)
        metrics = {name: float(value) for name, value in metrics.items()}
        check_finite(step + 1, loss=metrics["loss"], gradient=metrics["gradient_norm"])
        row = {"epoch": (step + 1) * cfg.epochs / len(plan), "seconds": time.perf_counter() - began}
        tokens = int((np.asarray(batch.documents) >= 0).sum())
        row |= {"tokens": tokens, "padding": 1 - tokens / batch.tokens.size}
        row["peak_memory_gb"] = peak_memory_gb()
        if (step + 1) % every == 0 or step + 1 == len(plan):
            scored = measure(state.trainable, scale, validation, **static)
            row |= {f"validation_{name}": value for name, value in scored.items()}
            if scored["loss"] < best["loss"]:
                best = {"loss": scored["loss"], "step": step + 1}
                save_weights(run.checkpoints / "best", state.trainable)
        run.log(step=step + 1, learning_rate=float(schedule(step)), **metrics, **row)
        checkpoints.maybe_save(step + 1, state, best)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    bar.close()
    checkpoints.close()
    del state
    trainable = load_weights(run.checkpoints / "best", replicated(trainable))
    scored = score_pairs(definition, trainable, scale, parts["test"][0], **shape)
    run.save_arrays("test_pairs", **scored)
    raw = Judge(*nnx.split(nnx.merge(definition, trainable, scale)))
    run.finish(
        best=best,
        steps=len(plan),
        scale=scale_on_reference(raw, pretrained, reference_prompts, cfg),
        decoder=dataclasses.asdict(pretrained.config),
        parameters=parameter_counts(trainable),
        **evidence(scored),
        **account(parts, run),
    )


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
    scale: nnx.State,
    batch: PairBatch,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    cfg: RewardConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on one batch of pairs."""

    def loss_fn(trainable):
        return pair_loss(nnx.merge(definition, trainable, scale).pairs(batch), batch, cfg)

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    return TrainState(trainable, opt_state, state.step + 1), metrics


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
def pair_scores(trainable, scale, batch: PairBatch, *, definition) -> Float[Array, "replies"]:
    """Raw scores of the replies of one batch."""
    return nnx.merge(definition, trainable, scale).pairs(batch)


def measure(
    trainable: nnx.State,
    scale: nnx.State,
    batches: Sequence[PairBatch],
    *,
    definition: nnx.GraphDef,
    cfg: RewardConfig,
) -> dict[str, float]:
    """Loss and accuracy over all pairs of some batches."""
    totals = {"loss": 0.0, "accuracy": 0.0}
    count = 0.0
    for batch in batches:
        scores = pair_scores(trainable, scale, batch, definition=definition)
        _, metrics = pair_loss(scores, batch, cfg)
        pairs = float(metrics["pairs"])
        totals = {name: total + pairs * float(metrics[name]) for name, total in totals.items()}
        count += pairs
    return {name: total / count for name, total in totals.items()}


def score_pairs(
    definition: nnx.GraphDef,
    trainable: nnx.State,
    scale: nnx.State,
    posts: Sequence[EncodedPost],
    *,
    batch_pairs: int,
    max_tokens: int,
    pad: int,
) -> dict[str, np.ndarray]:
    """Raw scores, lengths and labels of every pair, as columns of equal length."""
    rows = []
    for group in progress(groups(posts, batch_pairs=batch_pairs), label="test pairs"):
        batch = pack(group, batch_pairs=batch_pairs, max_tokens=max_tokens, pad=pad)
        scores = np.asarray(
            pair_scores(trainable, scale, over_devices(batch), definition=definition)
        )
        pairs = [(post, i) for post in group for i in range(len(post.pairs))]
        for k, (post, i) in enumerate(pairs):
            a, b = post.pairs[i]
            rows.append(
                (post.post_id, post.domain, post.grades[i] if post.grades else "",
                 scores[batch.chosen[k]], scores[batch.rejected[k]],
                 len(post.replies[a]), len(post.replies[b]))
            )  # fmt: skip
    columns = zip(*rows, strict=True)
    names = ("post", "domain", "grade", "chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return {name: np.asarray(column) for name, column in zip(names, columns, strict=True)}


def with_end(
    tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"], end: int
) -> tuple[Int[Array, "batch longer"], Bool[Array, "batch longer"]]:
    """Episodes as the reward model was trained to read them: every response ends.

    One that was cut off fills its row, so that the column added here is where its end belongs.
    """
    cut_off = mask[:, -1:] & (tokens[:, -1:] != end)
    column = jnp.full_like(tokens[:, :1], end)
    return jnp.concatenate([tokens, column], axis=1), jnp.concatenate([mask, cut_off], axis=1)


@functools.partial(jax.jit, static_argnames=("definition", "end"))
def response_rewards(
    state: nnx.State,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    responses: Responses,
    *,
    definition: nnx.GraphDef,
    end: int,
) -> Float[Array, "batch"]:
    """Normalised reward of sampled responses; nothing is added or taken away."""
    tokens = jnp.concatenate([prompts, responses.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, responses.mask], axis=1)
    return nnx.merge(definition, state)(*with_end(tokens, mask, end))


def scale_on_reference(
    model: Judge, pretrained: Pretrained, prompts: Sequence[str], cfg: RewardConfig
) -> dict[str, float]:
    """Centre and gain that give the pretrained policy's responses mean 0 and deviation 1 (N+)."""
    tokenizer = pretrained.tokenizer
    rows, masks, _ = prompt_rows(prompts, tokenizer, length=cfg.reference_prompt_tokens)
    responses = sample(
        pretrained.state, rows, masks, jax.random.key(cfg.seed), 1.0,
        decoder_def=pretrained.definition, length=cfg.reference_response_tokens,
        end=tokenizer.end, pad=tokenizer.pad,
    )  # fmt: skip
    raw = response_rewards(
        model.state, rows, masks, responses, definition=model.definition, end=tokenizer.end
    )
    return {"offset": float(raw.mean()), "gain": 1 / max(float(raw.std()), 1e-6)}


def evidence(scored: dict[str, np.ndarray]) -> dict[str, object]:
    """Accuracy on held-out pairs with intervals by post, and what length alone achieves."""
    difference = scored["chosen"] - scored["rejected"]
    correct = (1 + np.sign(difference)) / 2
    longer = (1 + np.sign(scored["chosen_tokens"] - scored["rejected_tokens"])) / 2
    ratio = scored["chosen_tokens"] / scored["rejected_tokens"]
    alike = np.abs(np.log(ratio)) < math.log(1.2)  # within 20 %
    clusters = scored["post"]
    found: dict[str, object] = {
        "accuracy": bootstrap(correct, clusters=clusters).asdict(),
        "longer_wins": bootstrap(longer, clusters=clusters).asdict(),
        "accuracy_by_domain": by_group(correct, scored["domain"], clusters=clusters),
        "length_correlation": float(
            np.corrcoef(
                np.concatenate([scored["chosen"], scored["rejected"]]),
                np.concatenate([scored["chosen_tokens"], scored["rejected_tokens"]]),
            )[0, 1]
        ),
    }
    if alike.sum() > 1:
        found["accuracy_alike"] = bootstrap(correct[alike], clusters=clusters[alike]).asdict()
    if any(scored["grade"]):
        found["accuracy_by_grade"] = by_group(correct, scored["grade"], clusters=clusters)
    return found


def account(parts: dict[str, tuple[list[EncodedPost], Fit]], run: Run) -> dict[str, object]:
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


def judge(run: Run, pretrained: Pretrained) -> Judge:
    """The frozen reward model of a finished run, with its normalisation."""
    definition, trainable, scale = initial(pretrained, run.config["seed"])
    trainable = load_weights(run.checkpoints / "best", trainable)
    model = nnx.merge(definition, trainable, scale)
    model.offset[...] = jnp.float32(run.summary["scale"]["offset"])
    model.gain[...] = jnp.float32(run.summary["scale"]["gain"])
    return Judge(*nnx.split(model))
