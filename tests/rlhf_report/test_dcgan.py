"""The GAN's chapter shows its images."""

import io

import numpy as np
from PIL import Image

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
