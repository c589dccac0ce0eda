"""python -m gan_jax {train,evaluate}"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from experiment_runs import hosts, inventory, settings
from experiment_runs.accelerator import idle_gpu
from experiment_runs.command import concluded
from experiment_runs.compilation import keep_programs
from experiment_runs.errors import UserError
from gan_jax import data, evaluation, experiment, export
from gan_jax.config import EvidenceConfig, GANConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a DCGAN on medical images and gather the evidence about it.

    A run of the same configuration and images is continued where it stopped, or only shown when
    it is finished. The values below are the profile's, and each of them can be changed:

      python -m gan_jax train --profile cpu
      python -m gan_jax train --profile assignment --student-id 123456 --data-dir data
      python -m gan_jax train --profile study --dataset bloodmnist --epochs 50
    """

    profile: str = "cpu"  # tiny, cpu, study or assignment; the last one on an accelerator
    data_dir: Path | None = None  # holds medmnist/NAME.npz; without it the file is fetched
    student_id: str | None = None  # even last digit: DermaMNIST; odd: ChestMNIST
    cfg: tyro.conf.OmitArgPrefixes[GANConfig] = GANConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Gather evidence about a finished run again, from more draws or images, and print it.

    The run itself stays as it is:

      python -m gan_jax evaluate results/local/gan-0123456789 --images 1000 --draws 20
    """

    run: tyro.conf.Positional[Path]  # the run's directory, as `train` prints it
    data_dir: Path | None = None  # holds medmnist/NAME.npz; without it the file is fetched
    evidence: tyro.conf.OmitArgPrefixes[EvidenceConfig] = EvidenceConfig()


def execute(command: Train | Evaluate) -> None:
    if command.data_dir is not None:
        settings.folder_of_data(command.data_dir, f"--data-dir {command.data_dir}")
    train(command) if isinstance(command, Train) else evaluate(command)


def train(command: Train) -> None:
    if warning := idle_gpu():
        print(warning, file=sys.stderr)
    kept = keep_programs()
    if experiment.committed() is None:
        print(f"GAN: compiled programs {kept}", file=sys.stderr)
    run = experiment.committed() or experiment.run(
        command.cfg, data_dir=command.data_dir, student_id=command.student_id
    )
    print(f"{run.path}\n\n{detector_table(run.summary['detectors'])}")


def evaluate(command: Evaluate) -> None:
    run = inventory.run_of(command.run, "gan")
    keep_programs()
    cfg, networks, state = export.load_networks(run)
    name = run.summary["dataset"]
    images = data.load(name, side=cfg.side, data_dir=command.data_dir, student_id=None)
    if images.fingerprint != run.record["inputs"]["images"]:
        raise UserError(
            f"{command.run}: trained on other images than {images.source}; use --data-dir"
        )
    cfg = dataclasses.replace(cfg, evidence=command.evidence)
    print(detector_table(evaluation.evaluate(cfg, images, networks, state)[0]["detectors"]))


def detector_table(rows: list[dict]) -> str:
    """Detectors by scenario; an asterisk marks what is caught."""
    table = pd.DataFrame(rows)
    table["shown"] = [f"{row['mean']:.3g}{' *'[row['caught']]}" for row in rows]
    wide = table.pivot(index="scenario", columns="detector", values="shown")
    wide = wide.loc[table["scenario"].unique(), table["detector"].unique()]
    width = shutil.get_terminal_size().columns
    return f"{wide.to_string(line_width=width)}\n* caught: t-tests with Holm's correction"


def parsed(arguments: list[str]) -> Train | Evaluate:
    """The command; what the environment or the named profile says are its options' defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--profile")
    asked = experiment.asked()
    asked["profile"] = first.parse_known_args(arguments)[0].profile or asked["profile"]
    training = Train(**asked, cfg=experiment.named(asked["profile"]))
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=training)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        prog="python -m gan_jax", args=arguments,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """What goes wrong is one message and an exit code; see `concluded`."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def work():
        hosts.join()
        execute(parsed(arguments))

    code = concluded(work)
    hosts.left(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
