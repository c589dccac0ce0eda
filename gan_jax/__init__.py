"""A DCGAN on medical images, with detectors of mode collapse."""

from gan_jax.config import PROFILES, EvidenceConfig, GANConfig
from gan_jax.experiment import from_environment, run

__all__ = ["PROFILES", "EvidenceConfig", "GANConfig", "from_environment", "run"]
