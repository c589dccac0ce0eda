"""PPO with a reward of one's own: a Python function of prompts and responses.

python examples/own_reward.py path/to/model     or an id on the hub; "random" shows that it runs
"""

import sys

import rlhf_jax

PROMPTS = ["Describe a river.", "What is a window?", "Tell me about bread.", "Why does it rain?"]


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """Nothing is best; every word costs a tenth."""
    return [-0.1 * len(response.split()) for response in responses]


def ends_well(prompts: list[str], responses: list[str]) -> list[float]:
    """One for a response that ends with a full stop."""
    return [float(response.strip().endswith(".")) for response in responses]


def main(name: str = "random") -> None:
    model = rlhf_jax.load(name)
    config = rlhf_jax.PPOConfig(
        prompts=len(PROMPTS), batch=8, forward_batch=4, responses_per_prompt=4,
        advantages="leave-one-out", passes=3, inner_epochs=2, response_tokens=16,
        learning_rate=1e-5, missing_end_penalty=0.0,
    )  # fmt: skip
    tuned = rlhf_jax.train_policy(
        model, PROMPTS, reward={"brevity": (brevity, 1.0), "end": (ends_well, 2.0)},
        config=config, out="results/own-reward",
    )  # fmt: skip
    print(tuned.run.metrics()[["step", "reward", "reward_brevity", "reward_end", "kl"]])
    for response in rlhf_jax.generate(tuned, PROMPTS, response_tokens=16):
        print(repr(response))


if __name__ == "__main__":
    main(*sys.argv[1:])
