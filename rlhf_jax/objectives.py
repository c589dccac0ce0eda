"""The report's equations as pure functions of arrays, in float32.

A mask is True where a value counts. Means are over what the mask keeps, never over padding.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar = Float[Array, ""]


def margin_ranking_loss(
    chosen: Float[Array, "pairs"], rejected: Float[Array, "pairs"], *, margin: float
) -> Float[Array, "pairs"]:
    """Hinge on the difference of two scores (@eq-margin): max(0, margin - (chosen - rejected))."""
    return jnp.maximum(0.0, margin - (chosen - rejected))


def logistic_loss(
    chosen: Float[Array, "pairs"], rejected: Float[Array, "pairs"]
) -> Float[Array, "pairs"]:
    """Negative log-likelihood of the preference (Bradley and Terry, 1952), in nats."""
    return -jax.nn.log_sigmoid(chosen - rejected)


def dpo_loss(
    logprobs: Float[Array, "pairs 2"], reference_logprobs: Float[Array, "pairs 2"], *, beta: float
) -> Float[Array, "pairs"]:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7), in nats.

    The logistic loss of implicit rewards beta * (log-probability - the reference's).

    Args:
      logprobs: of the chosen and the rejected reply to a prompt, summed over its tokens, nats.
      reference_logprobs: of the same replies, by the model that the training starts from.
      beta: weight of the KL to the reference in what is optimised, reward per nat.
    """
    rewards = beta * (logprobs - reference_logprobs)
    return logistic_loss(rewards[:, 0], rewards[:, 1])


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Scalar:
    """Mean of x where mask is True; 0 where it is True nowhere."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(dtype=x.dtype), 1)


def masked_whiten(
    x: Float[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """x with mean 0 and variance 1 under the mask, 0 outside (biased variance, as in N+)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def token_rewards(
    reward: Float[Array, "batch"],
    logprobs: Float[Array, "batch time"],
    reference_logprobs: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    kl_weight: float | Scalar,
) -> Float[Array, "batch time"]:
    """Reward of each token (Ziegler et al., 2019; @eq-token-reward).

    Every token pays kl_weight times its log-ratio to the reference; the last one of a response
    receives the reward of the whole.
    """
    penalty = jnp.where(mask, kl_weight * (logprobs - reference_logprobs), 0.0)
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    last = mask & ~following
    return jnp.where(last, reward[:, None], 0.0) - penalty


def generalized_advantages(
    rewards: Float[Array, "batch time"],
    values: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    discount: float,
    decay: float,
) -> Float[Array, "batch time"]:
    """Generalized advantage estimates (Schulman et al., 2016, eq. 16; @eq-gae).

    Computes A_t = delta_t + discount * decay * A_{t+1} with
    delta_t = r_t + discount * V_{t+1} - V_t, backwards in time; the value and the
    advantage after the last token of a response are 0.

    Args:
      rewards: reward of each response token, in units of the reward model.
      values: the critic's estimate before each token is emitted, same units.
      mask: True on response tokens; a response is one contiguous run of them.
      discount: gamma, per token.
      decay: lambda, per token; 0 is one-step TD, 1 is Monte Carlo.

    Returns:
      Advantages, 0 outside the mask.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + discount * following - values, 0.0)

    def backwards(advantage, delta):
        advantage = delta + discount * decay * advantage
        return advantage, advantage

    start = jnp.zeros(values.shape[0], values.dtype)
    _, advantages = jax.lax.scan(backwards, start, deltas.T, reverse=True)
    return jnp.where(mask, advantages.T, 0.0)


def leave_one_out_advantages(
    returns: Float[Array, "prompts responses"],
) -> Float[Array, "prompts responses"]:
    """What a response got more than the others to its prompt (Ahmadian et al., 2024, eq. 8).

    A_i = R_i - mean of the R_j, j other than i: the baseline is unbiased, because it does not
    depend on the response.

    Args:
      returns: of each response, penalties included, in units of the reward; two or more a prompt.
    """
    others = returns.shape[1] - 1
    return (returns - returns.mean(axis=1, keepdims=True)) * ((others + 1) / others)


def group_advantages(
    returns: Float[Array, "prompts responses"],
) -> Float[Array, "prompts responses"]:
    """Returns in deviations from the mean of their prompt (Shao et al., 2024, sec. 4.1.2).

    A_i = (R_i - mean) / (deviation + 1e-4): every prompt moves the policy alike, however far apart
    its rewards are; where all are equal, no response does. The deviation is the biased one.

    Args:
      returns: of each response, penalties included, in units of the reward; two or more a prompt.
    """
    centred = returns - returns.mean(axis=1, keepdims=True)
    return centred / (jnp.sqrt((centred**2).mean(axis=1, keepdims=True)) + 1e-4)


def clipped_policy_loss(
    logprobs: Float[Array, "batch time"],
    old_logprobs: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"],
    *,
    ratio_clip: float,
) -> Float[Array, "batch time"]:
    """PPO's pessimistic surrogate (Schulman et al., 2017, eq. 7; @eq-ppo), to be minimised."""
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1 - ratio_clip, 1 + ratio_clip)
    return jnp.maximum(-advantages * ratio, -advantages * clipped)


def clipped_value_loss(
    values: Float[Array, "batch time"],
    old_values: Float[Array, "batch time"],
    returns: Float[Array, "batch time"],
    *,
    value_clip: float,
) -> Float[Array, "batch time"]:
    """Half the squared error of the critic, the larger of clipped and unclipped (@eq-value)."""
    clipped = jnp.clip(values, old_values - value_clip, old_values + value_clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def approximate_kl(
    logprobs: Float[Array, "batch time"], old_logprobs: Float[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """k2 = (log-ratio)^2 / 2 (Schulman, 2020), nats; how far an update moved the policy."""
    return 0.5 * (logprobs - old_logprobs) ** 2


def kl_k1(
    logprobs: Float[Array, "batch time"], reference_logprobs: Float[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Unbiased, signed estimate of KL(policy || reference) on the policy's samples, nats."""
    return logprobs - reference_logprobs


def kl_k3(
    logprobs: Float[Array, "batch time"], reference_logprobs: Float[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Unbiased, never negative estimate of the same (Schulman, 2020), nats.

    Written with expm1: exp(d) - 1 - d loses every digit where the policies are close.
    """
    difference = reference_logprobs - logprobs
    return jnp.expm1(difference) - difference


def explained_variance(
    values: Float[Array, "batch time"],
    returns: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
) -> Scalar:
    """1 - Var(returns - values) / Var(returns); 0 is a constant critic, 1 a perfect one."""
    residual = returns - values
    unexplained = masked_mean((residual - masked_mean(residual, mask)) ** 2, mask)
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - unexplained / jnp.maximum(total, 1e-8)


def next_kl_weight(kl_weight: float, kl: float, *, target: float, gain: float) -> float:
    """Controller of the KL coefficient in log space (@eq-controller).

    weight <- weight * exp(g * clip(log(kl / target), -1, 1)). The classic controller (Ziegler et
    al., 2019), with its horizon of 10,000 episodes, moves by at most 22 % in 156 batches of 64,
    this one by exp(gain) a step, within [1e-4, 10]. It falls a quarter as fast as it rises: the KL
    starts at zero whatever the coefficient, and a coefficient that has fallen in the meantime lets
    the policy run past the target.

    Args:
      kl_weight: coefficient, reward per nat.
      kl: measured KL to the reference, nats per token; noise below zero counts as none.
      target: where to hold it.
      gain: g above the target; below it, g is a quarter of this.
    """
    error = min(max(math.log(max(kl, 1e-6) / target), -1.0), 1.0)
    change = math.exp((gain if error > 0 else gain / 4) * error)
    return min(max(kl_weight * change, 1e-4), 10.0)
