"""Do other settings keep the texts as they were while the reward rises?

Four changes of the LoRA variant, one at a time: a nearer KL target, a lower learning rate, longer
responses, a lower temperature of sampling. They are evaluated on the same unseen prompts as the
pretrained policy and the variant as it is; the lower temperature at that temperature, beside the
others at it. All else is the profile's, whose trained runs are loaded.

RLHF_DATA_DIR=folder python examples/gentler_settings.py study     over an hour on two cores
"""

import dataclasses
import sys

import pandas as pd

from experiment_runs import settings
from rlhf_jax import profiles
from rlhf_jax.config import PPOConfig
from rlhf_jax.experiment import Experiment
from rlhf_jax.profiles import Profile

TEMPERATURE = 0.7


def attempts(profile: Profile) -> list[Profile]:
    """The profile with three of the settings, and with the fourth as its LoRA variant."""

    def changed(**changes) -> PPOConfig:
        return dataclasses.replace(profile.lora, **changes)

    evaluation = dataclasses.replace(profile.evaluation, best_of=1)
    alone = dataclasses.replace(profile, seeds=1, dpo=None, evaluation=evaluation)
    others = {
        "ppo-kl": changed(target_kl=0.4 * profile.lora.target_kl),
        "ppo-rate": changed(learning_rate=profile.lora.learning_rate / 4),
        "ppo-length": changed(response_tokens=profile.lora.response_tokens * 8 // 5),
    }
    cooler = dataclasses.replace(evaluation, temperature=TEMPERATURE)
    return [
        dataclasses.replace(alone, others=others),
        dataclasses.replace(
            alone, lora=changed(temperature=TEMPERATURE), others={}, evaluation=cooler
        ),
    ]


def main(name: str = "tiny") -> None:
    for profile in attempts(profiles.profile(name)):
        experiment = Experiment(
            profile=profile, data_dir=settings.data_dir(), pairs_from=settings.preferences(),
            prompts_from=settings.prompts(),
        )  # fmt: skip
        run = experiment.run("evaluate")
        print(run.path)
        told = {
            policy: {
                "reward": own["reward"]["value"], "second reward": own["second_reward"]["value"],
                "KL per response": own["kl_per_sequence"], "perplexity": own["perplexity"],
                "ended": own["ended"],
            }
            for policy, own in run.summary["policies"].items()
        }  # fmt: skip
        print(pd.DataFrame(told).T.round(2).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
