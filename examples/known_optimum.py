"""A reward whose best policy is known: the share of a response's words that stand on a list of a
hundred frequent ones.

Its maximum is 1, and any response made of these words alone reaches it, so that a curve below 1
tells of the training and not of a weak reward model. Three estimators of the advantages, one table
of the learning curves.

python examples/known_optimum.py HuggingFaceTB/SmolLM2-135M-Instruct 40     steps of 16 episodes
"""

import dataclasses
import re
import sys

import pandas as pd

import rlhf_jax
from rlhf_jax.config import LINEAR_LAYERS

LISTED = """
the of and a to in is you that it he was for on are as with his they i at be this have from or one
had by word but not what all were we when your can said there use an each which she do how their if
will up other about out many then them these so some her would make like him into time has look two
more write go see number no way could people my than first water been call who oil its now find long
down day did get come made may part
"""
WORDS = {*LISTED.split()}
VERBS = ["Describe", "Explain", "Write about", "Tell me about"]
TOPICS = ["a ship", "winter", "the city", "a garden", "music", "a journey", "the moon", "bread"]
PROMPTS = [f"{verb} {topic}." for verb in VERBS for topic in TOPICS]


def share_of_listed_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Between 0 and 1; a response without words has 0."""
    words = [re.findall(r"\w+", response.lower()) for response in responses]
    return [sum(word in WORDS for word in own) / max(len(own), 1) for own in words]


def main(name: str = "random", steps: str = "8") -> None:
    model = rlhf_jax.load(name)
    gae = rlhf_jax.PPOConfig(
        lora=rlhf_jax.LoRAConfig(rank=16, dropout=0.0, targets=LINEAR_LAYERS),
        prompts=len(PROMPTS), batch=16, forward_batch=16, responses_per_prompt=4,
        passes=max(int(steps) // 8, 1), inner_epochs=2, prompt_tokens=40, response_tokens=16,
        learning_rate=1e-3, value_learning_rate=1e-3, kl_weight=1e-3, target_kl=5.0,
        missing_end_penalty=0.0,
    )  # fmt: skip
    curves = {}
    for advantages in ("gae", "leave-one-out", "group"):
        tuned = rlhf_jax.train_policy(
            model, PROMPTS, reward=share_of_listed_words, out="results/known-optimum",
            config=dataclasses.replace(gae, advantages=advantages),
        )  # fmt: skip
        curves[advantages] = tuned.run.metrics().set_index("step")["reward"]
        print(advantages, rlhf_jax.generate(tuned, PROMPTS[:2], response_tokens=16))
    print(pd.DataFrame(curves).round(3).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
