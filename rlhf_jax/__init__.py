"""Reward models and reinforcement learning for small language models, in JAX.

    import rlhf_jax

    model = rlhf_jax.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    rm = rlhf_jax.train_reward_model(model, pairs, out="results/rm")
    tuned = rlhf_jax.train_policy(model, prompts, reward=rm, out="results/ppo")
    print(rlhf_jax.generate(tuned, prompts[:3]))
    print(rm.score(prompts, responses))
    print(rlhf_jax.evaluate([model, tuned], unseen_prompts, rewards={"reward": rm}))

Pairs are mappings or a frame with prompt, chosen and rejected. A reward may also be any Python
function of a list of prompts and a list of responses, or {"name": (reward, weight), ...}.
"""

import importlib
import os
from typing import Any

# transformers would say at every start that PyTorch is missing; only its tokenizers are used here
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

MODULES = {  # of the public names, which are imported when they are asked for
    "load": "api", "train_reward_model": "api", "train_policy": "api", "generate": "api",
    "evaluate": "api", "TunedModel": "trained", "TrainedRewardModel": "trained",
    "RewardConfig": "config", "PPOConfig": "config", "LoRAConfig": "config",
    "EvaluationConfig": "config",
}  # fmt: skip
__all__ = [*MODULES]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *MODULES]
