"""A reward whose best policy is known: the share of a response's words that stand on a list.

Its maximum is 1, and any response made of these words alone reaches it, so that a curve below 1
tells of the training and not of a weak reward model. Three estimators of the advantages, one table
of the learning curves.

python examples/known_optimum.py HuggingFaceTB/SmolLM2-135M-Instruct 40     steps of 32 episodes
"""

import dataclasses
import re
import sys

import pandas as pd

import rlhf_jax

WORDS = {"the", "a", "and", "of", "to", "in", "is", "it", "sea", "wind", "sun", "rain", "blue"}
VERBS = ["Describe", "Explain", "Write about", "Tell me about"]
TOPICS = ["a ship", "winter", "the city", "a garden", "music", "a journey", "the moon", "bread"]
PROMPTS = [f"{verb} {topic}." for verb in VERBS for topic in TOPICS]


def share_of_listed_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Between 0 and 1; a response without words has 0."""
    words = [re.findall(r"\w+", response.lower()) for response in responses]
    return [sum(word in WORDS for word in own) / max(len(own), 1) for own in words]


def main(name: str = "random", steps: str = "2") -> None:
    model = rlhf_jax.load(name)
    gae = rlhf_jax.PPOConfig(
        prompts=len(PROMPTS), batch=32, forward_batch=8, responses_per_prompt=4,
        passes=max(int(steps) // 4, 1), inner_epochs=2, prompt_tokens=48, response_tokens=24,
        learning_rate=1e-4, value_learning_rate=1e-3, kl_weight=1e-3, target_kl=5.0,
        missing_end_penalty=0.0,
    )  # fmt: skip
    curves = {}
    for advantages in ("gae", "leave-one-out", "group"):
        tuned = rlhf_jax.train_policy(
            model, PROMPTS, reward=share_of_listed_words, out="results/known-optimum",
            config=dataclasses.replace(gae, advantages=advantages),
        )  # fmt: skip
        curves[advantages] = tuned.run.metrics().set_index("step")["reward"]
        print(advantages, rlhf_jax.generate(tuned, PROMPTS[:2], response_tokens=24))
    print(pd.DataFrame(curves).round(3).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
