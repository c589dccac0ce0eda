"""Direct preference optimisation (Rafailov et al., 2023): the pairs alone, nothing sampled."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiment_runs.checkpoints import Checkpoints, load_weights, save_weights
from experiment_runs.devices import check_divisible, filled, kept, on_mesh, over_devices, sharded
from experiment_runs.errors import UserError
from experiment_runs.process import peak_memory_gb, progress
from experiment_runs.run import Run
from rlhf_jax import objectives
from rlhf_jax.config import DPOConfig
from rlhf_jax.data.preferences import Post
from rlhf_jax.language_model.decoder import Decoder
from rlhf_jax.language_model.logprobs import response_states, token_logprobs
from rlhf_jax.language_model.sampling import divided
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.optimizer import decayed_adam, linear_schedule, optimizer_for
from rlhf_jax.optimization.state import TrainState, check_finite, initial_state, parameter_counts
from rlhf_jax.pretrained.model import Pretrained
from rlhf_jax.reward_model.encoding import EncodedPost, encode_posts

WIDTHS = 128  # tokens; rows are as wide as a multiple of this, so that few shapes occur


class PairRows(NamedTuple):
    """Chosen and rejected reply, each behind its prompt, padded on the right."""

    tokens: Int[Array, "pairs 2 time"]
    mask: Bool[Array, "pairs 2 time"]  # real tokens
    reply: Bool[Array, "pairs 2 time"]  # those of the reply, its end included


def encoded(
    cfg: DPOConfig, pretrained: Pretrained, parts: Mapping[str, Sequence[Post]]
) -> dict[str, list[tuple[tuple[int, ...], ...]]]:
    """Prompt, chosen and rejected reply of the pairs of each part that fit, as tokens.

    Raises:
      UserError: no pair of a part fits, fewer than a batch are there to train on, or a batch cannot
        be divided over the devices.
    """
    check_divisible("DPOConfig.forward_pairs", cfg.forward_pairs)
    pairs = {
        name: pairs_of(encode_posts(posts, pretrained.tokenizer, max_tokens=cfg.max_tokens)[0])
        for name, posts in parts.items()
    }
    for name, needed in (("train", cfg.batch_pairs), ("validation", 1)):
        if len(pairs[name]) < needed:
            raise UserError(
                f"{len(pairs[name])} {name} pairs fit into DPOConfig.max_tokens={cfg.max_tokens}; "
                f"{needed} are needed; give it more"
            )
    return pairs


@on_mesh
def train(
    run: Run, cfg: DPOConfig, pretrained: Pretrained, parts: Mapping[str, Sequence[Post]]
) -> None:
    """Trains a policy on "train" pairs, and says how it orders those for "validation".

    Args:
      run: where to log; resumes from its checkpoints.
      cfg: the configuration.
      pretrained: the model to start from, and the reference.
      parts: the posts.

    Raises:
      UserError: as `encoded`.
    """
    pairs = encoded(cfg, pretrained, parts)
    plan = [
        order[start : start + cfg.batch_pairs]
        for epoch in range(cfg.epochs)
        for order in [np.random.default_rng([cfg.seed, epoch]).permutation(len(pairs["train"]))]
        for start in range(0, len(order) - cfg.batch_pairs + 1, cfg.batch_pairs)
    ]
    pad = pretrained.tokenizer.pad
    schedule = linear_schedule(cfg.learning_rate, len(plan), cfg.warmup_fraction)
    optimizer = optimizer_for(
        {"all": decayed_adam(schedule, 0.0)}, lambda path: "all", clip_norm=cfg.clip_norm
    )
    state = initial_state(pretrained.state, optimizer)
    reference = sharded(pretrained.state, RULES)
    static = {"definition": pretrained.definition, "cfg": cfg}
    checkpoints = Checkpoints(run.checkpoints, run.identity)
    start = 0
    if restored := checkpoints.restore(state):
        start, state, _ = restored
    run.rewind(start or -1)
    bar = progress(label=run.stage, total=len(plan), initial=start)
    for step in range(start, len(plan)):
        began = time.perf_counter()
        batch = over_devices(rows([pairs["train"][i] for i in plan[step]], pad))
        state, metrics = update(state, reference, batch, optimizer=optimizer, **static)
        row = {name: float(value) for name, value in metrics.items()}
        check_finite(step + 1, loss=row["loss"], gradient=row["gradient_norm"])
        run.log(
            step=step + 1, epoch=(step + 1) * cfg.epochs / len(plan),
            learning_rate=float(schedule(step)), **row,
            seconds=time.perf_counter() - began, peak_memory_gb=peak_memory_gb(),
        )  # fmt: skip
        checkpoints.maybe_save(step + 1, state, {})
        bar.update()
        bar.set_postfix(loss=f"{row['loss']:.3f}")
    bar.close()
    checkpoints.close()
    save_weights(run.checkpoints / "policy", state.trainable, step=len(plan))
    found = []
    for some in whole_batches(pairs["validation"], cfg.forward_pairs):
        batch = over_devices(rows([some[i] for i in filled(len(some))], pad))
        found.append(measure(state.trainable, reference, batch, len(some), **static))
    run.finish(
        steps=len(plan),
        pairs={name: len(own) for name, own in pairs.items()},
        trained_parameters=parameter_counts(state.trainable),
        train_seconds=float(run.metrics()["seconds"].sum()),
        validation={name: float(np.mean([own[name] for own in found])) for name in found[0]},
    )


def pairs_of(posts: Sequence[EncodedPost]) -> list[tuple[tuple[int, ...], ...]]:
    """Prompt, chosen and rejected reply of every pair, as tokens."""
    return [
        (post.prompt, post.replies[chosen], post.replies[rejected])
        for post in posts
        for chosen, rejected in post.pairs
    ]


def whole_batches(pairs: Sequence, size: int) -> list[Sequence]:
    """Batches of `size` pairs, what is left over not counted; one smaller where there are fewer."""
    size = min(size, len(pairs))
    return [pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size)]


def rows(pairs: Sequence[tuple[tuple[int, ...], ...]], pad: int) -> PairRows:
    """Pairs laid out, as wide as the longest of them needs."""
    longest = max(len(prompt) + max(map(len, replies)) for prompt, *replies in pairs)
    shape = len(pairs), 2, -(-longest // WIDTHS) * WIDTHS
    tokens, mask, reply = (
        np.full(shape, pad, np.int32),
        np.zeros(shape, bool),
        np.zeros(shape, bool),
    )
    for i, (prompt, *replies) in enumerate(pairs):
        for j, own in enumerate(replies):
            end = len(prompt) + len(own)
            tokens[i, j, :end] = *prompt, *own
            mask[i, j, :end] = True
            reply[i, j, len(prompt) : end] = True
    return PairRows(*map(jnp.asarray, (tokens, mask, reply)))


def reply_logprobs(decoder: Decoder, batch: PairRows) -> Float[Array, "pairs 2"]:
    """Log-probability of every reply after its prompt, summed over its tokens, nats."""
    tokens, mask, reply = (x.reshape(-1, x.shape[-1]) for x in batch)
    states = response_states(decoder, tokens, mask, 1)
    logprobs = token_logprobs(decoder, states, tokens[:, 1:], 1.0)
    return jnp.where(reply[:, 1:], logprobs, 0.0).sum(axis=1).reshape(-1, 2)


def some_pairs(trainable, reference, batch: PairRows, *, definition, cfg: DPOConfig):
    """Sum of the loss over some pairs, and what is logged of each."""
    others = reply_logprobs(nnx.merge(definition, reference), batch)
    logprobs = reply_logprobs(nnx.merge(definition, trainable), batch)
    losses = objectives.dpo_loss(logprobs, jax.lax.stop_gradient(others), beta=cfg.beta)
    gained = cfg.beta * (logprobs - others)  # the implicit reward, up to a constant of the prompt
    return losses.sum(), {
        "loss": losses,
        "accuracy": gained[:, 0] > gained[:, 1],
        "reward_chosen": gained[:, 0],
        "reward_rejected": gained[:, 1],
    }


@functools.partial(
    jax.jit, static_argnames=("definition", "optimizer", "cfg"), donate_argnames="state"
)
def update(
    state: TrainState,
    reference: nnx.State,
    batch: PairRows,
    *,
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    cfg: DPOConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on a batch of pairs, `forward_pairs` of them at a time."""
    function = functools.partial(some_pairs, definition=definition, cfg=cfg)

    def accumulate(total, part):
        (_, metrics), grads = jax.value_and_grad(function, has_aux=True)(
            state.trainable, reference, part
        )
        return jax.tree.map(jnp.add, total, grads), jax.tree.map(jnp.sum, metrics)

    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    grads, metrics = jax.lax.scan(accumulate, zeros, divided(batch, cfg.forward_pairs))
    grads, metrics = (
        jax.tree.map(lambda x: x / cfg.batch_pairs, tree)
        for tree in (grads, jax.tree.map(jnp.sum, metrics))
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    trainable = optax.apply_updates(state.trainable, updates)
    return kept(TrainState(trainable, opt_state, state.step + 1), RULES), metrics


@functools.partial(jax.jit, static_argnames=("definition", "cfg"))
def measure(
    trainable, reference, batch: PairRows, count: int | Int[Array, ""], *, definition, cfg
) -> dict[str, Array]:
    """Means over the first pairs of a batch of what a step logs."""
    _, found = some_pairs(trainable, reference, batch, definition=definition, cfg=cfg)
    counts = jnp.arange(len(batch.tokens)) < count
    return jax.tree.map(lambda x: jnp.where(counts, x, 0).sum() / count, found)


def tuned_decoder(run: Run, pretrained: Pretrained) -> tuple[nnx.GraphDef, nnx.State]:
    """Static half and arrays of the policy that a finished run trained."""
    return pretrained.definition, load_weights(run.checkpoints / "policy", pretrained.state)
