"""Best of n: of n samples of the pretrained policy the one that the reward model likes most."""

import math

import numpy as np
from jaxtyping import Float


def best_of_n(
    rewards: Float[np.ndarray, "prompts samples"],
    judged: Float[np.ndarray, "prompts samples"],
    n: int,
) -> Float[np.ndarray, "prompts"]:
    """What the best of n responses, by one reward, is worth by another, in expectation.

    The mean over all ways to take n of a prompt's samples: of N samples sorted by their reward the
    i-th is the best one of C(i - 1, n - 1) of the C(N, n) ways (the unbiased estimate that
    Nakano et al., 2021, give in their appendix).

    Args:
      rewards: that choose.
      judged: of the same responses, by the same or by another reward.
      n: of how many one is chosen, at most the samples of a prompt.
    """
    count = rewards.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n={n} must be from 1 to the {count} samples of a prompt")
    ways = np.asarray([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    order = np.argsort(rewards, axis=1, kind="stable")
    return np.take_along_axis(np.asarray(judged, np.float64), order, axis=1) @ ways


def best_of_n_kl(n: int) -> float:
    """KL of best of n to the policy that samples, nats a response, at most (Beirami et al., 2024).

    log n - (n - 1) / n; less where two samples may be the same.
    """
    return math.log(n) - (n - 1) / n


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to the samples of a prompt."""
    return [2**i for i in range(samples.bit_length())]
