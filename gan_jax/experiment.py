"""The whole GAN part of the report as one stage: train or load, with all evidence."""

import sys
from pathlib import Path
from typing import Any

from experiment_runs import precision, settings
from experiment_runs.errors import UserError
from experiment_runs.inventory import find
from experiment_runs.run import Run, ensure
from gan_jax import data, evaluation, export, model_card, training
from gan_jax.config import PROFILES, GANConfig
from gan_jax.training import GRID_SHAPE


def run(
    profile: str | GANConfig, *, data_dir: Path | None = None, student_id: str | None = None
) -> Run:
    """The finished run of a profile (or of any configuration), trained when there is none.

    Args:
      profile: a name in `PROFILES`, or a configuration.
      data_dir: folder whose `medmnist/` holds MedMNIST's files; without it they are fetched.
      student_id: its last digit chooses the data set where the configuration names none.

    Raises:
      UserError: no such profile, or images that cannot be had.
    """
    cfg = (named(profile) if isinstance(profile, str) else profile).resolved()
    images = data.load(cfg.dataset, side=cfg.side, data_dir=data_dir, student_id=student_id)
    fewest = GRID_SHAPE[0] * GRID_SHAPE[1]
    if min(len(images.train), len(images.held_out)) < fewest:
        raise UserError(
            f"{images.source}: {len(images.train)} training and {len(images.held_out)} held-out "
            f"images; the grids need at least {fewest} of each"
        )
    print(f"GAN: {images.source}; {len(images.train)} training images", file=sys.stderr)
    print(f"GAN: precision {precision.told(cfg.precision)}", file=sys.stderr)

    total = cfg.steps(len(images.train))

    def work(run: Run) -> None:
        networks, state, frames = training.train(run, cfg, images)
        export.save_networks(run, networks, state)
        summary, grids = evaluation.evaluate(cfg, images, networks, state)
        with_real = {name: grids.pop(name) for name in ("real", "neighbours")}
        run.save_arrays(frames=frames, **grids)
        run.save_arrays("real", **with_real)  # apart: licences may forbid to pass them on
        summary |= {
            "dataset": images.name, "source": images.source, "classes": images.classes,
            "train_images": len(images.train), "held_out_images": len(images.held_out),
            "channels": images.train.shape[-1], "steps": total,
            "frame_steps": training.frame_steps(cfg, total),
        }  # fmt: skip
        (run.path / "README.md").write_text(model_card.generator_card(run, summary))
        run.finish(**summary)

    # Patches that stand in are the same for every set; what they stand in for is not.
    asked_for = cfg.dataset or data.dataset_for(student_id)
    inputs = {"images": images.fingerprint, "dataset": asked_for}
    return ensure("gan", cfg, work, inputs=inputs)


def named(profile: str) -> GANConfig:
    """A profile by name."""
    if profile not in PROFILES:
        raise UserError(f"profile '{profile}': unknown; use one of {', '.join(PROFILES)}")
    return PROFILES[profile]


def from_environment() -> Run:
    """The run that the report shows: a committed one, or what `asked` says."""
    return committed() or run(**asked())


def asked() -> dict[str, Any]:
    """Arguments of `run` that the environment gives; see `experiment_runs.settings`."""
    return {
        "profile": settings.profile(),
        "data_dir": settings.data_dir(),
        "student_id": settings.student_id(),
    }


def committed() -> Run | None:
    """The committed run that RLHF_RUN names, if it names one."""
    folder = settings.committed()
    return find("gan", folder) if folder else None
