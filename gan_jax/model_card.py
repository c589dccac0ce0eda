"""The README.md of a run: what its generator is, how to draw images from it, what it cannot do."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from experiment_runs.run import Run

USE = """\
import torch
from safetensors.torch import load_file
from torch import nn

weights, layers = load_file("generator.safetensors"), []
for index in (0, 3, 6, 9, 12):
    inputs, outputs, kernel, _ = weights[f"{index}.weight"].shape
    place = (1, 0) if index == 0 else (1, 4) if kernel == 5 else (2, 1)  # stride, padding
    layers += [nn.ConvTranspose2d(inputs, outputs, kernel, *place, bias=False)]
    layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if index < 12 else [nn.Tanh()]
generator = nn.Sequential(*layers).eval()
generator.load_state_dict(weights)
images = generator(torch.randn(32, weights["0.weight"].shape[0], 1, 1))  # in [-1, 1]"""

LIMITS = """\
* The images are not of patients and fit for no medical use: nobody has judged whether they show
  what a diagnosis needs, and at this size they cannot.
* They are no anonymous stand-in for the training images, which a generator may recite: see the
  share of images that are nearer to a training image than to any held-out one.
* Rare classes may be missing: see the report's table of classes.
* The licence of the training images binds what is learnt from them; look it up with its owners."""


def generator_card(run: Run, summary: Mapping[str, Any]) -> str:
    """The card of a trained generator.

    Args:
      run: its configuration and where it came from.
      summary: its results, as `Run.finish` takes them.
    """
    rows = [row for row in summary["detectors"] if row["scenario"] in ("real", "generated")]
    values = {(row["scenario"], row["detector"]): f"{row['mean']:.3g}" for row in rows}
    names = dict.fromkeys(row["detector"] for row in rows)
    results = [f"| {n} | {values['real', n]} | {values['generated', n]} |" for n in names]
    settings = [f"| {name} | {value} |" for name, value in run.config.items()]
    source = f"{summary['source']}; {summary['train_images']} training images"
    epochs = summary["steps"] * run.config["batch"] / summary["train_images"]
    about = ModelCardData(pipeline_tag="unconditional-image-generation", tags=["dcgan", "jax"])
    return "\n".join(
        [
            "---", about.to_yaml(), "---", "", f"# DCGAN of {summary['dataset']}", "",
            f"Draws images of {run.config['side']} pixels from noise. Trained on: {source}; "
            f"{summary['steps']} updates, {epochs:.1f} epochs.",
            "", "## Use", "", "`generator.safetensors` is a plain `nn.Sequential` of PyTorch:",
            "", "```python", USE, "```", "", "## Results", "",
            "Real images against real ones, and generated images against real ones:", "",
            "| detector | real | generated |", "|---|---|---|", *results,
            "", "## Limits", "", LIMITS, "", "## Configuration", "",
            "| setting | value |", "|---|---|", *settings, "",
            f"Run {run.identity}, code {run.record['git']}, {run.record['device']}, "
            f"started {run.record['started']}.", "",
        ]
    )  # fmt: skip
