"""Three estimators of the advantages, two seeds each, in one table.

python examples/sweep_over_seeds.py path/to/model     finished runs are loaded, not trained again
"""

import dataclasses
import sys

import pandas as pd

import rlhf_jax

PROMPTS = ["Count to five.", "Name three birds.", "Say hello.", "List two metals."]


def digits(prompts: list[str], responses: list[str]) -> list[float]:
    """How many digits a response has."""
    return [float(sum(c.isdigit() for c in response)) for response in responses]


def main(name: str = "random") -> None:
    model = rlhf_jax.load(name)
    gae = rlhf_jax.PPOConfig(
        prompts=len(PROMPTS), batch=8, forward_batch=8, responses_per_prompt=4, passes=2,
        inner_epochs=2, response_tokens=12, missing_end_penalty=0.0,
    )  # fmt: skip
    rows = []
    for advantages in ("gae", "leave-one-out", "group"):
        for seed in (0, 1):
            cfg = dataclasses.replace(gae, advantages=advantages, seed=seed)
            tuned = rlhf_jax.train_policy(
                model, PROMPTS, reward=digits, config=cfg, out="results/sweep"
            )
            metrics = tuned.run.metrics()
            rows.append(
                {
                    "advantages": advantages, "seed": seed,
                    "first reward": metrics["reward"].iloc[0],
                    "last reward": metrics["reward"].iloc[-1], "KL": metrics["kl"].iloc[-1],
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    print(table.groupby("advantages")["last reward"].agg(["mean", "std"]).round(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
