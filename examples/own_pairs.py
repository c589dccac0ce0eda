"""A reward model from pairs of one's own, a policy tuned against it, and both models compared.

python examples/own_pairs.py path/to/model     or an id on the hub; "random" shows that it runs
"""

import sys

import rlhf_jax

TOPICS = ["rivers", "windows", "bread", "rain", "maps", "salt", "clocks", "trees", "wool", "iron"]
VERBS = ["Explain", "Describe", "Praise", "Define", "Compare", "Question"]
PROMPTS = [f"{verb} {topic}." for verb in VERBS for topic in TOPICS]
# prompts and replies may also be lists of {"role": ..., "content": ...}
PAIRS = [
    {
        "prompt": prompt,
        "chosen": f"With pleasure: {prompt.lower()} It is an old subject, and a good one.",
        "rejected": f"No. {prompt} Why should I? Number {number}.",
    }
    for number, prompt in enumerate(PROMPTS)
]


def main(name: str = "random") -> None:
    model = rlhf_jax.load(name)
    rm = rlhf_jax.train_reward_model(
        model, PAIRS, out="results/own-pairs",
        config=rlhf_jax.RewardConfig(epochs=2, reference_samples=8, reference_response_tokens=16),
    )  # fmt: skip
    print("accuracy on pairs that were held out:", rm.run.summary["accuracy"]["value"])
    print(rm.score(["Praise maps."] * 2, ["With pleasure: maps are good.", "No. Why should I?"]))
    tuned = rlhf_jax.train_policy(
        model, PROMPTS[:16], reward=rm, out="results/own-pairs",
        config=rlhf_jax.PPOConfig(
            prompts=16, batch=8, forward_batch=4, passes=1, response_tokens=16
        ),
    )  # fmt: skip
    unseen = ["What are stamps for?", "Tell me about paper."]
    table = rlhf_jax.evaluate([model, tuned], unseen, rewards={"reward": rm}, response_tokens=16)
    print(table.T)


if __name__ == "__main__":
    main(*sys.argv[1:])
