"""What an episode is rewarded for: reward models, Python functions of texts, weighted sums."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiment_runs import devices, hosts
from experiment_runs.errors import UserError
from rlhf_jax.data.dialogues import Conversation, messages
from rlhf_jax.reward_model.model import FrozenRewardModel

# prompts and responses to one number a response
RewardFunction = Callable[[list[Any], list[str]], Sequence[float]]


def on_all_processes(function: RewardFunction) -> RewardFunction:
    """Marks a function that every process of a job asks at the same time, and none alone: its model
    is divided over the devices of all."""
    function.on_all_processes = True
    return function


class Term(NamedTuple):
    """One summand of the reward."""

    scorer: FrozenRewardModel | RewardFunction
    weight: float


Reward = (
    FrozenRewardModel
    | RewardFunction
    | Mapping[str, tuple[FrozenRewardModel | RewardFunction, float]]
)
RESERVED = ("std", "histogram")  # the log's own columns are reward_std and reward_histogram


def named_rewards(reward: Any) -> dict[str, tuple[Any, float]]:
    """The summands of a reward by name, with their weights; a single one is called "reward".

    Raises:
      UserError: there is none, or its weight is no number.
    """
    named = reward if isinstance(reward, Mapping) else {"reward": (reward, 1.0)}
    if not named:
        raise UserError("reward={}: name at least one reward, as {'name': (reward, weight)}")
    for name, pair in named.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or isinstance(pair, FrozenRewardModel):
            raise UserError(f"reward[{name!r}] must be a pair (reward, weight), not {pair!r:.80}")
        if name in RESERVED:
            raise UserError(f"reward[{name!r}]: the log has other uses for that name; take another")
        if not isinstance(pair[1], Real) or not np.isfinite(pair[1]):
            raise UserError(f"reward[{name!r}] has the weight {pair[1]!r}; give a finite number")
    return {str(name): pair for name, pair in named.items()}


def reward_terms(reward: Any) -> dict[str, Term]:
    """The summands of a `Reward` by name; a single one is called "reward" and has weight 1.

    Raises:
      UserError: a summand is neither a reward model nor a function, or its weight is no number.
    """
    terms = {}
    for name, (source, weight) in named_rewards(reward).items():
        if not isinstance(source, FrozenRewardModel) and not callable(source):
            raise UserError(
                f"reward[{name!r}] is {source!r:.80}; give a trained reward model or a function "
                "of a list of prompts and a list of responses"
            )
        terms[name] = Term(source, float(weight))
    return terms


def models_of(terms: Mapping[str, Term]) -> dict[str, Term]:
    """The terms that are reward models."""
    return {
        name: term for name, term in terms.items() if isinstance(term.scorer, FrozenRewardModel)
    }


def functions_of(terms: Mapping[str, Term]) -> dict[str, RewardFunction]:
    """The functions among the terms."""
    return {
        n: term.scorer
        for n, term in terms.items()
        if not isinstance(term.scorer, FrozenRewardModel)
    }


def function_rewards(
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[Conversation],
    responses: Sequence[str],
) -> dict[str, Float[np.ndarray, "batch"]]:
    """What each function says of the responses; of several processes the first one asks, once, and
    all those that are marked with `on_all_processes`.

    Args:
      functions: by name.
      prompts: one a response; functions get a dialogue as a list of messages.
      responses: as text, without the end token.

    Raises:
      UserError: a function returns other than one finite number for each response.
    """
    asked = [messages(prompt) for prompt in prompts]
    found = {}
    for name, function in functions.items():
        by_all = not hosts.several() or hasattr(function, "on_all_processes")
        found[name] = np.zeros(len(responses), np.float32)
        if by_all or hosts.first():
            with contextlib.nullcontext() if by_all else devices.alone():
                found[name] = checked(name, function(list(asked), list(responses)), responses)
    return hosts.of_first(found)


def checked(name: str, returned: Any, responses: Sequence[str]) -> Float[np.ndarray, "batch"]:
    """What a function returned as an array, one finite number for each response."""
    wanted = f"it must return {len(responses)} numbers, one for each response"
    try:
        rewards = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"reward function {name!r} returned {returned!r:.80}; {wanted}") from None
    if rewards.shape != (len(responses),):
        raise UserError(
            f"reward function {name!r} returned an array of shape {rewards.shape}; {wanted}"
        )
    wrong = np.flatnonzero(~(np.abs(rewards) <= np.finfo(np.float32).max))
    if len(wrong):
        raise UserError(
            f"reward function {name!r} returned {rewards[wrong[0]]} for the response "
            f"{responses[wrong[0]]!r:.80}; every reward must be a finite number"
        )
    return rewards.astype(np.float32)
