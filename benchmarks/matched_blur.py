"""Real images as blurred as each committed DCGAN's images are far from real ones.

`python benchmarks/matched_blur.py --data-dir FOLDER` writes results/measured/matched_blur.json;
medmnist/dermamnist.npz is in FOLDER. Blurred images have lost detail and no mode: what a training
has lost beside detail, it has lost beyond them.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import turns

from gan_jax import calibration, data
from gan_jax.config import EvidenceConfig
from gan_jax.evaluation import CLASSIFIER, DRAWS, EVIDENCE, MATCHING
from gan_jax.features import feature_space
from rlhf_report import long_trainings


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--output", type=Path, default=long_trainings.MATCHED)
    args = options.parse_args()
    cfg = EvidenceConfig()
    runs = list(long_trainings.committed().values())
    (dataset,) = {run.record["inputs"]["dataset"] for run in runs}
    images = data.load(dataset, side=28, data_dir=args.data_dir, student_id=None)
    key = jax.random.fold_in(jax.random.key(0), CLASSIFIER)
    space = feature_space(images, key, steps=cfg.classifier_steps)
    real = calibration.real_images(images, np.random.default_rng([0, EVIDENCE]), cfg)
    found = {"circumstances": turns.circumstances().splitlines(), "images": images.source}
    for run in runs:
        fid = long_trainings.by_detector(run.summary, long_trainings.GENERATED)["fid"]["mean"]
        random = np.random.default_rng([0, MATCHING])
        strengths = calibration.matched(fid, images, real, space, random, steps=cfg.matching_steps)
        sets = calibration.scenarios(images, no_generator, 0, strengths)
        own = {name: sets[name] for name in (long_trainings.REAL, calibration.BLURRED)}
        values = calibration.measured(own, real, space, cfg, [0, DRAWS])
        found[run.path.name] = {
            "matched": strengths._asdict(),
            "detectors": calibration.calibration_table(values),
            "birthday": calibration.birthday_table(values, real.count),
        }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


def no_generator(latents: np.ndarray) -> np.ndarray:
    """Stands where the scenarios with generated images have a generator; they are not asked."""
    raise AssertionError(f"{len(latents)} images were asked for")


if __name__ == "__main__":
    main()
