"""The compiled step: scores of the episodes, their advantages, and all inner epochs."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from experiment_runs.devices import kept
from rlhf_jax import objectives
from rlhf_jax.config import PPOConfig
from rlhf_jax.language_model.logprobs import token_logprobs
from rlhf_jax.language_model.sampling import Responses, divided, ends_response
from rlhf_jax.language_model.sharding import RULES
from rlhf_jax.optimization.optimizer import at_step
from rlhf_jax.optimization.state import TrainState
from rlhf_jax.ppo.rollout import Episodes, Frozen, Static, episode_metrics, score


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def update(
    state: TrainState,
    frozen: Frozen,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    responses: Responses,
    function_terms: Mapping[str, Float[Array, "batch"]],
    kl_weight: float | Float[Array, ""],
    key: Array,
    *,
    static: Static,
) -> tuple[TrainState, dict[str, Array], Episodes]:
    """Scores the episodes and runs all inner epochs on them, in one program.

    Args:
      state: what is trained; consumed.
      frozen: everything else that the step reads.
      prompts: one a response, padded on the left.
      prompt_mask: True on the prompts' tokens.
      responses: what the policy of `state` sampled.
      function_terms: the terms of the reward that Python functions made of the texts, times their
        weights; those of reward models are computed here.
      kl_weight: of the penalty, reward per nat.
      key: for the dropout of adapters.
      static: configuration, optimizer and the models' static halves.

    Returns:
      The next state, metrics of the step, and the scored episodes.
    """
    cfg = static.cfg
    episodes = score(
        state.trainable, frozen, prompts, prompt_mask, responses, function_terms, static=static
    )
    ended = ends_response(responses.tokens, static.end)
    cut_off = ~(ended & responses.mask).any(axis=1)
    token_rewards = objectives.token_rewards(
        episodes.reward - cfg.missing_end_penalty * cut_off,
        episodes.logprobs, episodes.reference_logprobs, episodes.mask, kl_weight=kl_weight,
    )  # fmt: skip
    advantages, returns = advantages_and_returns(token_rewards, episodes, cfg)
    state, inner = optimise(state, frozen, episodes, advantages, returns, key, static=static)
    return state, inner | episode_metrics(episodes, responses, returns, cut_off), episodes


def advantages_and_returns(
    token_rewards: Float[Array, "batch response"], episodes: Episodes, cfg: PPOConfig
) -> tuple[Float[Array, "batch response"], Float[Array, "batch response"] | None]:
    """Advantages of the tokens, and what the critic should have said, where there is one.

    Without a critic all tokens of a response have the same: what it got more than others did, its
    penalties included. The papers put the KL into the loss (GRPO) or, as here, the reward (RLOO).
    """
    mask = episodes.mask
    if cfg.has_critic:
        advantages = objectives.generalized_advantages(
            token_rewards, episodes.values, mask, discount=cfg.discount, decay=cfg.gae_decay
        )
        return objectives.masked_whiten(advantages, mask), advantages + episodes.values
    compared = RESPONSE_ADVANTAGES[cfg.advantages]
    of_prompt = token_rewards.sum(axis=1).reshape(-1, cfg.responses_per_prompt)
    return jnp.where(mask, compared(of_prompt).reshape(-1, 1), 0.0), None


RESPONSE_ADVANTAGES = {
    "leave-one-out": objectives.leave_one_out_advantages,
    "group": objectives.group_advantages,
}


def optimise(
    state, frozen, episodes, advantages, returns, key, *, static
) -> tuple[TrainState, dict[str, Array]]:
    """The inner epochs: one optimizer step each, gradients summed over forward batches.

    An epoch that finds the policy further than `approx_kl_limit` from the one that sampled is the
    last. Metrics are those of the first and of the last epoch that ran. The learning rate goes on
    as if all had run, so that it ends at zero.
    """
    cfg = static.cfg
    count = jnp.maximum(episodes.mask.sum(), 1)
    parts = divided((episodes, advantages, returns), cfg.forward_batch)
    number = jnp.arange(cfg.batch // cfg.forward_batch)

    def loss_fn(trainable, part, dropout_key):
        model = nnx.merge(static.policy, trainable, frozen.policy)
        return ppo_loss(model, *part, dropout_key, count=count, static=static)

    def epoch(carry):
        index, state, first, _ = carry
        epoch_key = jax.random.fold_in(key, index)

        def accumulate(total, item):
            number, part = item
            dropout_key = jax.random.fold_in(epoch_key, number) if cfg.lora else None
            (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.trainable, part, dropout_key
            )
            return kept(jax.tree.map(jnp.add, total, grads), RULES), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        grads, metrics = jax.lax.scan(accumulate, zeros, (number, parts))
        metrics = jax.tree.map(jnp.sum, metrics)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        updates, opt_state = static.optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        state = TrainState(trainable, opt_state, state.step + 1)
        first = jax.tree.map(lambda a, b: jnp.where(index == 0, b, a), first, metrics)
        return index + 1, state, first, metrics

    def going_on(carry):
        index, _, _, metrics = carry
        return (index < cfg.inner_epochs) & (metrics["approx_kl"] <= cfg.approx_kl_limit)

    names = [*METRICS, "gradient_norm"] + ["value_loss"] * cfg.has_critic
    empty = dict.fromkeys(names, jnp.zeros(()))
    planned = state.step + cfg.inner_epochs
    index, state, first, last = jax.lax.while_loop(going_on, epoch, (0, state, empty, empty))
    state = state._replace(opt_state=at_step(state.opt_state, planned), step=planned)
    return kept(state, RULES), last | {
        "inner_epochs": index,
        "first_ratio_error": first["ratio_error"],
        "first_approx_kl": first["approx_kl"],
    }


METRICS = ("policy_loss", "approx_kl", "clip_fraction", "ratio_error")


def ppo_loss(model, episodes, advantages, returns, dropout_key, *, count, static):
    """Policy and value loss of some episodes, as their share of the whole batch's mean (@eq-total).

    Args:
      model: the actor-critic being trained.
      episodes, advantages, returns: of one forward batch.
      dropout_key: for the adapters' dropout; None where there is none.
      count: response tokens in the whole batch.
      static: configuration.
    """
    cfg = static.cfg
    width = episodes.tokens.shape[1] - episodes.mask.shape[1]
    states, values = model.states_and_values(
        episodes.tokens, episodes.token_mask, width, dropout_key
    )
    logprobs = token_logprobs(model.decoder, states, episodes.tokens[:, width:], cfg.temperature)
    # Outside the mask nothing may count, not even as infinity times zero.
    logprobs = jnp.where(episodes.mask, logprobs, episodes.logprobs)
    policy_losses = objectives.clipped_policy_loss(
        logprobs, episodes.logprobs, advantages, ratio_clip=cfg.ratio_clip
    )
    distance = jnp.abs(jnp.exp(logprobs - episodes.logprobs) - 1)

    def share(x):
        return jnp.where(episodes.mask, x, 0.0).sum() / count

    policy_loss = share(policy_losses)
    metrics = {
        "policy_loss": policy_loss,
        "approx_kl": share(objectives.approximate_kl(logprobs, episodes.logprobs)),
        "clip_fraction": share(distance > cfg.ratio_clip),
        "ratio_error": share(distance),
    }
    if returns is None:
        return policy_loss, metrics
    value_losses = objectives.clipped_value_loss(
        values, episodes.values, returns, value_clip=cfg.value_clip
    )
    value_loss = share(value_losses)
    return policy_loss + cfg.value_weight * value_loss, metrics | {"value_loss": value_loss}
