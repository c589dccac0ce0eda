"""The GAN's chapter shows its images."""

import dataclasses
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from experiment_runs.files import write_text
from experiment_runs.run import Run
from gan_jax import training
from gan_jax.config import GANConfig
from rlhf_report import dcgan


def test_the_growth_plays_its_frames_and_stands_still_as_a_strip():
    frames = np.zeros((3, 4, 8, 6, 6, 3), np.uint8)
    frames[1], frames[2] = 128, 255
    picture = Image.open(io.BytesIO(dcgan.animation(frames, [10, 20, 30]).data))
    middle = np.array(picture.size) // 2

    def shades():
        pixels = np.asarray(picture.convert("L"))
        return {int(pixels[row, middle[0]]) for row in range(100, picture.size[1] - 100)}

    assert picture.n_frames == 4 and {0, 128, 255} <= shades()
    for number, shade in enumerate((0, 128, 255), start=1):
        picture.seek(number)
        assert shades() == {shade}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.2, 0.3, "by heart"),
        (0.001, 0.02, "too little to call it memory"),
        (-0.01, 0.02, "does not tell"),
        (-0.3, -0.2, "more real to it than those"),
    ],
)
def test_memory_is_claimed_only_of_a_notable_gap(tmp_path, low, high, words):
    gap = {"mean": (low + high) / 2, "low": low, "high": high}
    record = {"stage": "gan", "identity": "0", "config": {}, "inputs": {}, "about": {}}
    write_text(tmp_path / "config.json", json.dumps(record))
    run = Run(tmp_path)
    run.finish(scores={"gap": gap})
    assert words in dcgan.memorisation_reading(run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Nothing is added to it."),
        ({"label_smoothing": 0.1}, "Added to the plain DCGAN: real images have the target 0.9."),
        ({"augmentation": ("shift", "cutout")}, "after random shift and cutout."),
        ({"spectral_norm": True}, "spectral norm 1, in place of BatchNorm."),
    ],
)
def test_options_are_told_where_they_are_on(options, words):
    plain = {"label_smoothing": 0.0, "augmentation": (), "spectral_norm": False}
    assert dcgan.options_reading(SimpleNamespace(config=plain | options)).endswith(words)


@pytest.mark.parametrize("side, spectral", [(28, False), (64, False), (28, True)])
def test_the_layers_are_those_that_are_trained(side, spectral):
    cfg = GANConfig(widths=(16, 8, 8, 4), latents=10, side=side, spectral_norm=spectral)
    run = SimpleNamespace(config=dataclasses.asdict(cfg), summary={"channels": 3})
    _, state = training.initial(cfg, channels=3)
    for network, last in (("generator", f"{side} x {side} x 3"), ("discriminator", "1 x 1 x 1")):
        rows = dcgan.layers_table(run, network)
        params = getattr(state, network).params
        assert len(rows) == 5 and rows["output"].iloc[-1] == last
        assert rows["parameters"].sum() == sum(x.size for x in jax.tree.leaves(params))
    assert rows["followed by"].str.contains("spectral").any() == spectral
