"""A model folder of one's own in, a tuned model folder out, and both asked the same.

python examples/own_model_folder.py path/to/model path/to/new/folder
"""

import sys
from pathlib import Path

import rlhf_jax

PROMPTS = ["Name a colour.", "Name a fruit.", "Name a city.", "Name a tool."]
DIALOGUE = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And another one?"},
]


def lower_case(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of letters that are not capitals."""
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in responses]


def main(name: str = "random", folder: str = "tuned-model") -> None:
    model = rlhf_jax.load(name)
    config = rlhf_jax.PPOConfig(
        prompts=len(PROMPTS), batch=4, forward_batch=4, passes=2, response_tokens=16,
        lora=rlhf_jax.LoRAConfig(), learning_rate=1e-4,
    )  # fmt: skip
    tuned = rlhf_jax.train_policy(
        model, PROMPTS, reward=lower_case, config=config, out="results/own-model"
    )
    if not Path(folder).exists():
        tuned.save(folder)
    again = rlhf_jax.load(folder)
    for each in (model, again):
        print(each.name, rlhf_jax.generate(each, [*PROMPTS, DIALOGUE], response_tokens=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
