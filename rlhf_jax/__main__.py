"""python -m rlhf_jax {run,reward,ppo,evaluate}"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from reporting.runs import Run, UserError
from rlhf_jax import config, pipeline
from rlhf_jax.config import Profile
from rlhf_jax.pipeline import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command; the configuration's fields follow with the profile's values."""

    profile: str = "cpu"  # tiny, cpu, study or assignment; the last one on an accelerator
    data_dir: Path | None = None  # local copies in shp/, oasst/; without it the hub or a stand-in
    cfg: Annotated[Profile, tyro.conf.arg(name="")] = config.cpu()

    @property
    def experiment(self) -> Experiment:
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise UserError(f"--data-dir {self.data_dir}: no such folder")
        return Experiment(profile=self.cfg, data_dir=self.data_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class All(Command):
    """Everything: reward model, both PPO variants, evaluation.

    Finished runs are loaded, a run that was cut off goes on where it stopped:

      python -m rlhf_jax run --profile cpu
      python -m rlhf_jax run --profile study --data-dir data --model path/to/model
      python -m rlhf_jax run --ppo.learning-rate 2e-5 --lora.lora.rank 4
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Command):
    """The reward model alone.

    python -m rlhf_jax reward --profile cpu --reward.loss logistic
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Command):
    """One PPO variant, and the reward model that it needs.

    python -m rlhf_jax ppo --variant lora --lora.lora.rank 16
    """

    variant: Literal["full", "lora"] = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """The three policies on unseen prompts, and what they need.

    python -m rlhf_jax evaluate --evaluation.prompts 200
    """


def announce(experiment: Experiment) -> None:
    """Which model, data and device, and how long it will take."""
    profile = experiment.profile
    print(f"profile  {profile.name}: {profile.promise}")
    where = experiment.model_path
    print(f"model    {profile.model} ({'random weights' if where is None else where.name})")
    for name, source in experiment.sources.items():
        print(f"data     {name}: {source.rows} from {source.name} ({source.kind})")
    device = jax.devices()[0]
    print(f"device   {len(jax.devices())} x {device.device_kind}, {os.cpu_count()} cores")
    print(f"time     about {profile.minutes} minutes on two cores, less what is done", flush=True)


def execute(command: Command) -> list[Run]:
    experiment = command.experiment
    announce(experiment)
    match command:
        case Reward():
            stages = ["reward"]
        case PPO():
            stages = ["reward", f"ppo-{command.variant}"]
        case _:
            stages = list(pipeline.STAGES)
    return [experiment.run(stage) for stage in stages]


def parsed(arguments: list[str]) -> Command:
    """The command, with the named profile's values as defaults of its options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--profile")
    known = first.parse_known_args(arguments)[0]
    chosen = known.profile or pipeline.default_profile()
    default = {"profile": chosen, "cfg": config.profile(chosen)}
    commands = {"run": All, "reward": Reward, "ppo": PPO, "evaluate": Evaluate}
    union = [
        Annotated[kind, tyro.conf.subcommand(name, default=kind(**default))]
        for name, kind in commands.items()
    ]
    return tyro.cli(
        union[0] | union[1] | union[2] | union[3],
        prog="python -m rlhf_jax",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )


def main(arguments: list[str] | None = None) -> None:
    """Bad input is told in one message, with exit code 2."""
    try:
        for run in execute(parsed(sys.argv[1:] if arguments is None else arguments)):
            print(f"{run.stage:9}{run.path}")
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
