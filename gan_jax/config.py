"""Configuration of the GAN and its named profiles."""

import dataclasses
import itertools
from typing import Literal

from experiment_runs import assignment
from experiment_runs.configuration import (
    check_positive,
    check_seed,
    check_types,
    made,
    reject,
)
from experiment_runs.errors import UserError
from experiment_runs.precision import resolved

WEIGHTS = 2**28  # of a generator: with the discriminator, gradients and Adam's moments 8 GB
VALUES = 2**28  # in the widest layer of a batch, of which a step keeps some ten; 1 GB each
POLICIES = ("colour", "translation", "cutout")  # of augmentation.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """How much evidence is gathered about the trained networks.

    Every detector is computed `draws` times on `images` images, for generated images and for
    every calibration scenario alike.
    """

    images: int = 500  # in one draw, both of the sample and of the reference
    draws: int = 10
    neighbours: int = 5  # k in precision, recall, density and coverage
    classifier_steps: int = 1500  # of batches of 128; the classifier's features measure distances
    matching_steps: int = 10  # halvings in the search for the noise and blur of the generator's FID

    def __post_init__(self):
        check_types(self)
        check_positive(self, "classifier_steps", "matching_steps")
        if self.draws < 2:
            reject(self, "draws", "2 or more, of which there is an interval")
        if not 1 <= self.neighbours < self.images:
            raise UserError(
                f"neighbours is {self.neighbours}; needs 1 <= neighbours < images ({self.images})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GANConfig:
    """A DCGAN (Radford et al., 2016); the defaults are the assignment's protocol."""

    dataset: str | None = None  # a 2D MedMNIST name or "histology"; None: by the student ID
    side: int = 28  # pixels: 28 or 64
    latents: int = 100
    widths: tuple[int, int, int, int] = (512, 256, 128, 64)  # generator; discriminator reversed
    batch: int = 64
    epochs: int = 1000
    most_steps: int | None = None  # stop after so many updates, however few epochs they make
    learning_rate: float = 2e-4
    momentum: float = 0.5  # beta_1 of Adam
    variance_decay: float = 0.999  # beta_2 of Adam
    label_smoothing: float = 0.0  # the discriminator's target for real images is 1 minus this
    augmentation: tuple[str, ...] = ()  # of what the discriminator sees, by names in POLICIES
    spectral_norm: bool = False  # in the discriminator, in place of its BatchNorm
    # Of matrix products, on a CPU; see `experiment_runs.precision`. "auto": what it is fast in.
    precision: Literal["auto", "float32", "mixed"] = "auto"
    seed: int = 0
    dispatch_steps: int = 20  # updates in one compiled call; one logged line each
    checkpoint_steps: int = 1000
    frames: int = 12  # sample grids kept over time
    evidence: EvidenceConfig = EvidenceConfig()

    def __post_init__(self):
        check_types(self)
        check_positive(self, "learning_rate", "latents", "batch", "epochs", "most_steps")
        check_positive(self, "dispatch_steps", "checkpoint_steps", "frames")
        for name in ("momentum", "variance_decay"):
            if not 0 <= getattr(self, name) < 1:  # at 1 nothing of a gradient is ever taken
                reject(self, name, "from 0 to below 1")
        check_seed(self)
        if self.side not in (28, 64):
            reject(self, "side", "28 or 64, which the generator's last layer makes")
        if len(self.widths) != 4 or min(self.widths) < 1:
            reject(self, "widths", "four positive numbers")
        channels = [self.latents, *self.widths, 3]
        weights = sum(16 * below * above for below, above in itertools.pairwise(channels))
        if weights > WEIGHTS:
            raise UserError(
                f"widths is {self.widths} and latents {self.latents}: the generator would have "
                f"{weights:,} weights; needs less than {WEIGHTS:,}"
            )
        if (values := self.batch * max(self.dispatch_steps, self.widest)) > VALUES:
            raise UserError(
                f"batch is {self.batch}: with these widths and dispatch_steps it has "
                f"{values:,} values; needs less than {VALUES:,}"
            )
        if not 0 <= self.label_smoothing < 0.5:
            reject(self, "label_smoothing", "from 0 to below 0.5")
        if not {*self.augmentation} <= {*POLICIES}:
            reject(self, "augmentation", f"some of {', '.join(POLICIES)}")

    @property
    def widest(self) -> int:
        """Values of one image in the generator's widest layer."""
        return max(width * 4 ** (2 + layer) for layer, width in enumerate(self.widths))

    def resolved(self) -> "GANConfig":
        """With the precision of this machine; on an accelerator convolutions stay in float32."""
        mixed = resolved(self.precision) == "mixed"
        return dataclasses.replace(self, precision="mixed" if mixed else "float32")

    def steps(self, images: int) -> int:
        """Updates in all for so many training images, in whole dispatches (rounded up)."""
        wanted = self.epochs * max(1, images // self.batch)
        if self.most_steps is not None:
            wanted = min(wanted, self.most_steps)
        return -(-wanted // self.dispatch_steps) * self.dispatch_steps


PROFILES = {
    # Seconds: for tests. The images are noise.
    "tiny": GANConfig(
        widths=(16, 8, 8, 4), batch=16, most_steps=8, dispatch_steps=4, checkpoint_steps=4,
        frames=2, precision="float32",
        evidence=EvidenceConfig(images=32, draws=2, classifier_steps=4),
    ),
    # A quarter of the protocol's widths, and so many updates as fit into a first look (times are in
    # results/measured/make-report.txt). Tissue is recognisable; fine detail is not.
    "cpu": GANConfig(
        widths=(128, 64, 32, 16), most_steps=1500, checkpoint_steps=400, frames=8,
        evidence=EvidenceConfig(images=250, draws=5, classifier_steps=200),
    ),
    # Half the protocol's widths.
    "study": GANConfig(widths=(256, 128, 64, 32), most_steps=6000),
    # The protocol, as assignment.toml has it: 1,000 epochs (results/measured/accelerator-h100.txt).
    "assignment": assignment.needed(
        lambda: made(GANConfig, assignment.values("gan"), f"{assignment.PATH}: [protocol.gan]")
    ),
}  # fmt: skip
