"""Figures of the GAN: grids of images, also over time, its learning, and what detectors catch."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.axes import Axes
from PIL import Image as Picture

from experiment_runs.run import Run
from reporting.figures import BLUE, GREY, ORANGE, panels

DPI = 160  # of animations
FRAME_MILLISECONDS, LAST_MILLISECONDS = 600, 2400
STRIP_ROWS = 6  # moments that an animation's still picture shows


def grids(run: Run) -> dict[str, np.ndarray]:
    """All grids of images; those with real ones are missing from committed runs."""
    real = run.arrays("real") if (run.path / "real.npz").exists() else {}
    return run.arrays() | real


def image_grid(images: np.ndarray | None, *, width: float = 6.5) -> None:
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
    show_grid(ax, images)


def show_grid(ax: Axes, images: np.ndarray, labels: Sequence[str] = ()) -> None:
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


def growth(frames: np.ndarray, steps: Sequence[int]) -> None:
    """Sample grids over time: an animation where pictures move, a strip of moments where not."""
    display(animated(frames, steps))


def animated(frames: np.ndarray, steps: Sequence[int]) -> Image:
    """Sample grids over time, as one file for pages and for print.

    An animated PNG whose still picture is not one of its frames: browsers play the frames, and
    what knows no animation (a PDF) shows the strip, one moment a row.

    Args:
      frames: bytes, [frames rows columns height width channels].
      steps: updates after which each frame was drawn.
    """
    moving = [drawn(grid, f"step {step:,}") for grid, step in zip(frames, steps, strict=True)]
    images = frames.reshape(len(frames), -1, *frames.shape[3:])
    moments = np.unique(np.linspace(0, len(frames) - 1, STRIP_ROWS).round().astype(int))
    strip = images[moments, : 2 * STRIP_ROWS]  # as wide as the grids of 4 by 8
    still = drawn(strip, "after so many steps", [f"{steps[moment]:,}" for moment in moments])
    durations = [FRAME_MILLISECONDS] * (len(moving) - 1) + [LAST_MILLISECONDS]
    file = io.BytesIO()
    still.save(
        file, "PNG", save_all=True, default_image=True, append_images=moving,
        duration=durations, loop=0, dpi=(DPI, DPI),
    )  # fmt: skip
    return Image(file.getvalue(), format="png", width=still.width * 110 // DPI)


def drawn(images: np.ndarray, title: str, labels: Sequence[str] = ()) -> Picture.Image:
    """A grid as pixels, always of the same size."""
    figure, (ax,) = panels(1, width=6.5, height=3.5)
    show_grid(ax, images, labels)
    ax.set_title(title)
    figure.set_dpi(DPI)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    return Picture.fromarray(np.ascontiguousarray(pixels))


def gan_learning(run: Run) -> None:
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


def detector_chart(rows: pd.DataFrame) -> None:
    """Which detector catches what: a triangle where it does, that points where it has moved."""
    scenarios, detectors = list(rows["scenario"].unique()), list(rows["detector"].unique())
    _, (ax,) = panels(1, height=0.9 + 0.3 * len(scenarios))
    x, y = rows["detector"].map(detectors.index), rows["scenario"].map(scenarios.index)
    above, below = rows["mean"] > rows["real_high"], rows["mean"] < rows["real_low"]
    ax.scatter(x[above], y[above], s=60, marker="^", color=BLUE)
    ax.scatter(x[below], y[below], s=60, marker="v", color=ORANGE)
    ax.scatter(x[~above & ~below], y[~above & ~below], s=12, color=GREY)
    ax.set(yticks=range(len(scenarios)), yticklabels=scenarios, xticks=range(len(detectors)))
    ax.set_xticklabels(detectors, rotation=40, ha="right")
    ax.invert_yaxis()
    ax.margins(0.06)
