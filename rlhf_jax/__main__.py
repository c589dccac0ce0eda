"""python -m rlhf_jax {run,check,reward,ppo,evaluate,generate,chat,rate,export,runs}

The first five read a profile and train what it describes; the others use what has been trained.
"""

import argparse
import contextlib
import dataclasses
import functools
import operator
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiment_runs import devices, hosts, inventory, precision, settings
from experiment_runs.accelerator import idle_gpu
from experiment_runs.command import concluded
from experiment_runs.compilation import keep_programs
from experiment_runs.errors import UserError
from rlhf_jax import memory, run_commands
from rlhf_jax.config import LoRAConfig
from rlhf_jax.experiment import Experiment, from_environment
from rlhf_jax.ppo import training as ppo_training
from rlhf_jax.profiles import Profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command; the configuration's fields follow with the profile's values."""

    # tiny, cpu, study or assignment; the last one on an accelerator. A card of 16 GB takes the
    # first three, in float32 where it has no bfloat16 (compute capability below 8.0).
    profile: str
    data_dir: Path | None  # local copies in shp/, oasst/; without it the hub or a stand-in
    preferences: str  # folder, file or hub id of preference pairs, before --data-dir
    prompts: str  # folder, file or hub id of prompts, before --data-dir
    cfg: Annotated[Profile, tyro.conf.arg(name="")]
    mesh: str = ""  # devices by axes, data=4,model=2; all of them on data by default
    dry_run: bool = False  # say how much memory each stage will take, and train nothing
    remat: bool = False  # compute blocks again for the gradient: less memory, more time
    reward_lora_rank: int = 0  # the reward model learns adapters of this rank; 0: every weight

    @property
    def experiment(self) -> Experiment:
        if self.data_dir is not None:
            settings.folder_of_data(self.data_dir, f"--data-dir {self.data_dir}")
        profile = self.cfg
        if self.reward_lora_rank:
            adapted = dataclasses.replace(
                profile.reward, lora=LoRAConfig(rank=self.reward_lora_rank)
            )
            profile = dataclasses.replace(profile, reward=adapted)
        return Experiment(
            profile=profile,
            data_dir=self.data_dir,
            pairs_from=self.preferences,
            prompts_from=self.prompts,
            committed=settings.committed(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class All(Command):
    """Everything: both reward models, all policies, DPO where the profile has it, evaluation.

    Finished runs are loaded, a run that was cut off goes on where it stopped:

      python -m rlhf_jax run --profile cpu
      python -m rlhf_jax run --profile study --data-dir data --model path/to/model
      python -m rlhf_jax run --ppo.learning-rate 2e-5 --lora.lora.rank 4
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Command):
    """Read and check all inputs - data, prompts, model - and train nothing.

    For instance:

      python -m rlhf_jax check --profile assignment --data-dir data
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Command):
    """The reward model alone.

    For instance:

      python -m rlhf_jax reward --profile cpu --reward.loss logistic
      python -m rlhf_jax reward --reward-lora-rank 8 --reward.learning-rate 1e-3
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Command):
    """One PPO variant, and the reward model that it needs.

    For instance:

      python -m rlhf_jax ppo --variant lora --lora.lora.rank 16
    """

    variant: Literal["full", "lora"] = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """All policies of the profile on unseen prompts, and what they need.

    For instance:

      python -m rlhf_jax evaluate --evaluation.prompts 200
    """


COMMANDS = {"run": All, "check": Check, "reward": Reward, "ppo": PPO, "evaluate": Evaluate}


def execute(command: Command) -> None:
    """Trains or loads the stages that a command names."""
    settings.divide(command.mesh, command.remat)
    experiment = command.experiment
    kept = keep_programs()
    if experiment.committed is None:
        announce(experiment)
        print(f"programs {kept}", flush=True)
    if command.dry_run:
        for cfg in experiment.profile.different_policies.values():
            ppo_training.check(cfg, experiment.pretrained)
        print(memory.dry_run(experiment.pretrained.config, experiment.profile))
        return
    match command:
        case Check():
            if experiment.committed is None:
                _ = experiment.checked
            print("inputs   read and checked")
        case Reward():
            show(experiment, ["reward"])
        case PPO():
            show(experiment, ["reward", f"ppo-{command.variant}"])
        case _:
            show(experiment, experiment.stages)


def announce(experiment: Experiment) -> None:
    """Which model, data and device, and how long it will take."""
    profile, where = experiment.profile, experiment.model_path
    tell("profile", f"{profile.name}: {profile.promise}")
    tell("model", f"{profile.model} ({'random weights' if where is None else where.name})")
    for name, source in experiment.sources.items():
        tell("data", f"{name}: {source.rows:,} from {source.name} ({source.kind})")
    if warning := idle_gpu():
        print(warning, file=sys.stderr)
    tell("products", precision.told(profile.dtype))
    if others := other_precisions(settings.results(), profile.dtype):
        tell("", f"{settings.results()} has runs in {' and '.join(others)}, which PRECISION or "
             "--precision goes on with")  # fmt: skip
    mesh = devices.mesh()
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    tell("device", f"{mesh.size} x {kind} ({axes}), {os.cpu_count()} cores")
    tell("time", f"about {profile.time} on two cores, less what is done")


def other_precisions(folder: Path, own: str) -> list[str]:
    """The precisions of runs in a folder, where none of them is in this one."""
    found = set()
    for run in inventory.runs_in(folder) if folder.is_dir() else []:
        with contextlib.suppress(UserError):
            model = run.about.get("model")
            found.add(model.get("dtype") if isinstance(model, dict) else None)
    return [] if own in found else sorted({*settings.PRECISIONS} & found)


def tell(label: str, text: str) -> None:
    """A label and a text, in lines that fit the terminal."""
    width = max(shutil.get_terminal_size().columns, 40)
    lines = textwrap.wrap(text, width - 9, break_long_words=False, break_on_hyphens=False)
    print(f"{label:9}" + f"\n{'':9}".join(lines), flush=True)


def show(experiment: Experiment, stages: list[str]) -> None:
    """Trains or loads the stages and says where each is."""
    for stage in stages:
        print(f"{stage:20}{experiment.run(stage).path}", flush=True)


def parsed(arguments: list[str]) -> Command | run_commands.RunCommand:
    """The command; what the environment or the named profile says are its options' defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--profile")
    experiment = from_environment(first.parse_known_args(arguments)[0].profile)
    default = {
        "profile": experiment.profile.name,
        "data_dir": experiment.data_dir,
        "preferences": experiment.pairs_from,
        "prompts": experiment.prompts_from,
        "cfg": experiment.profile,
        "mesh": settings.mesh(),
        "remat": settings.rematerialized(),
    }
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, default=kind(**default))]
        for name, kind in COMMANDS.items()
    ] + [
        Annotated[kind, tyro.conf.subcommand(name)] for name, kind in run_commands.COMMANDS.items()
    ]
    return tyro.cli(
        functools.reduce(operator.or_, kinds),
        prog="python -m rlhf_jax",
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )


def main(arguments: list[str] | None = None) -> None:
    """What goes wrong is one message and an exit code; see `concluded`."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def work():
        if settings.hosts() and arguments and arguments[0] in run_commands.COMMANDS:
            raise UserError(f"{arguments[0]} works in one process: call it without RLHF_HOSTS")
        hosts.join()
        settings.backend()  # before anything else asks for the devices
        command = parsed(arguments)
        if isinstance(command, Command):
            execute(command)
        else:
            command.execute()

    code = concluded(work)
    hosts.left(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
