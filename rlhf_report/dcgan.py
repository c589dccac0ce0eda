"""The chapter on the DCGAN: grids of images, also over time, and its learning."""

import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flax import nnx
from IPython.display import Image, display
from matplotlib.axes import Axes
from PIL import Image as Picture

from experiment_runs.run import Run
from gan_jax.dcgan import Discriminator, Generator
from rlhf_report.style import BLUE, ORANGE, listed, mean_with_interval, panels

DPI = 160  # of animations
FRAME_MILLISECONDS, LAST_MILLISECONDS = 600, 2400
KNOWN_BY_HEART = 0.05  # of the probability of being real, between training and held-out images
STRIP_ROWS = 6  # moments that an animation's still picture shows


def image_grids(run: Run) -> dict[str, np.ndarray]:
    """All grids of images; those with real ones are missing from committed runs."""
    real = run.arrays("real") if (run.path / "real.npz").exists() else {}
    return run.arrays() | real


def grid_figure(images: np.ndarray | None, *, width: float = 6.5) -> None:
    """Rows and columns of images, or a note in their place.

    Args:
      images: bytes, [rows columns height width channels]; None for what was not committed.
      width: of the figure, inches.
    """
    if images is None:
        _, (ax,) = panels(1, width=width, height=0.5)
        ax.text(0.5, 0.5, "Committed without the real images: train a run of your own to see them.",
                ha="center", va="center")  # fmt: skip
        ax.set_axis_off()
        return
    rows, columns = images.shape[:2]
    _, (ax,) = panels(1, width=width, height=width * rows / columns + 0.1)
    draw_grid(ax, images)


def draw_grid(ax: Axes, images: np.ndarray, labels: Sequence[str] = ()) -> None:
    """Rows and columns of images on some axes, with labels of the rows, if any."""
    rows, columns, height, width, channels = images.shape
    pasted = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if channels == 1 else {}
    ax.imshow(pasted.squeeze(), **grey, interpolation="nearest")
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([height * (row + 0.5) for row in range(len(labels))], labels)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def growth_figure(frames: np.ndarray, steps: Sequence[int]) -> None:
    """Sample grids over time: an animation where pictures move, a strip of moments where not."""
    display(animation(frames, steps))


def animation(frames: np.ndarray, steps: Sequence[int]) -> Image:
    """Sample grids over time, as one file for pages and for print.

    An animated PNG whose still picture is not one of its frames: browsers play the frames, and
    what knows no animation (a PDF) shows the strip, one moment a row.

    Args:
      frames: bytes, [frames rows columns height width channels].
      steps: updates after which each frame was drawn.
    """
    moving = [grid_pixels(grid, f"step {step:,}") for grid, step in zip(frames, steps, strict=True)]
    images = frames.reshape(len(frames), -1, *frames.shape[3:])
    moments = np.unique(np.linspace(0, len(frames) - 1, STRIP_ROWS).round().astype(int))
    strip = images[moments, : 2 * STRIP_ROWS]  # as wide as the grids of 4 by 8
    still = grid_pixels(strip, "after so many steps", [f"{steps[moment]:,}" for moment in moments])
    durations = [FRAME_MILLISECONDS] * (len(moving) - 1) + [LAST_MILLISECONDS]
    file = io.BytesIO()
    still.save(
        file, "PNG", save_all=True, default_image=True, append_images=moving,
        duration=durations, loop=0, dpi=(DPI, DPI),
    )  # fmt: skip
    return Image(file.getvalue(), format="png", width=still.width * 95 // DPI)


def grid_pixels(images: np.ndarray, title: str, labels: Sequence[str] = ()) -> Picture.Image:
    """A grid as pixels, always of the same size."""
    figure, (ax,) = panels(1, width=6.5, height=3.5)
    draw_grid(ax, images, labels)
    ax.set_title(title)
    figure.set_dpi(DPI)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    return Picture.fromarray(np.ascontiguousarray(pixels))


def learning_figure(run: Run) -> None:
    """Losses of both networks, and what the discriminator says of real and generated images."""
    metrics = run.metrics()
    smooth = metrics.rolling(max(1, len(metrics) // 60), min_periods=1).mean()
    _, axes = panels(2)
    shown = (
        (axes[0], {"loss_d": "discriminator", "loss_g": "generator"}, "loss (nats)"),
        (axes[1], {"d_real": "D(x), real", "d_fake": "D(G(z)), generated"}, "probability of real"),
    )
    for ax, columns, label in shown:
        for column, colour, dash in zip(columns, (BLUE, ORANGE), ("-", "--"), strict=True):
            ax.plot(smooth["step"], smooth[column], color=colour, linestyle=dash,
                    label=columns[column])  # fmt: skip
        ax.set(xlabel="step", ylabel=label)
        ax.legend()


def options_reading(run: Run) -> str:
    """What the configuration adds to the plain DCGAN."""
    cfg, found = run.config, []
    if cfg["label_smoothing"]:
        found.append(f"real images have the target {1 - cfg['label_smoothing']:g}")
    if cfg["augmentation"]:
        found.append(f"the discriminator sees images after random {listed(cfg['augmentation'])}")
    if cfg["spectral_norm"]:
        found.append("its kernels have spectral norm 1, in place of BatchNorm")
    return f"Added to the plain DCGAN: {'; '.join(found)}." if found else "Nothing is added to it."


def layers_table(run: Run, network: str) -> pd.DataFrame:
    """The layers of a network as it was trained: kernels, what follows, output, parameters.

    Args:
      run: gives widths and sides.
      network: "generator" or "discriminator".
    """
    cfg, channels = run.config, run.summary["channels"]
    shape = {"side": cfg["side"], "channels": channels}
    if network == "generator":
        built = Generator(latents=cfg["latents"], widths=tuple(cfg["widths"]), **shape)
        last, hidden, after, ends = built.image, (1, 1, 1, cfg["latents"]), "ReLU", "tanh"
    else:
        built = Discriminator(
            widths=tuple(cfg["widths"][::-1]), **shape, spectral=cfg["spectral_norm"]
        )
        last, hidden, after, ends = (
            built.logit, (1, cfg["side"], cfg["side"], channels), "LeakyReLU", "the logit",
        )  # fmt: skip
    rows, norms = [], [*built.norms, None]
    for layer, norm in zip([*built.blocks, last], norms, strict=True):
        hidden = jax.eval_shape(layer, jax.ShapeDtypeStruct(hidden, jnp.float32)).shape
        kernel, stride = layer.kernel[...], layer.stride
        name = "transposed convolution" if layer.transposed else "convolution"
        kind = "spectral norm and shift" if cfg["spectral_norm"] and norm else "BatchNorm"
        counted = kernel.size + sum(x.size for x in jax.tree.leaves(nnx.state(norm, nnx.Param)))
        rows.append(
            {
                "layer": f"{name}, {kernel.shape[0]} x {kernel.shape[1]}, stride {stride}",
                "followed by": f"{kind}, {after}" if norm else ends,
                "output": " x ".join(map(str, hidden[1:])), "parameters": counted,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def memorisation_reading(run: Run) -> str:
    """Whether the discriminator knows its training images by heart."""
    gap = run.summary["scores"]["gap"]
    text = f"The gap is {mean_with_interval(gap)}: "
    if gap["low"] > KNOWN_BY_HEART:
        return text + "it knows training images by heart."
    if gap["low"] > 0:
        return text + "training images seem a little more real to it, too little to call it memory."
    if gap["high"] < 0:
        return text + "held-out images seem more real to it than those that it was trained on."
    return text + "it does not tell the images that it was trained on from new ones."
