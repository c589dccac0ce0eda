"""Trained networks on disk: both for this library, the generator for PyTorch as well.

`generator.safetensors` is the state of a plain `nn.Sequential`; the run's README.md says how to
draw images from it (model_card.py).
"""

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from experiment_runs.checkpoints import load_weights, save_weights, written
from experiment_runs.devices import replicated
from experiment_runs.run import Run
from gan_jax.config import EvidenceConfig, GANConfig
from gan_jax.training import Definitions, State, initial

FINAL = "final"  # of a run's checkpoints: both networks after the last step


def save_networks(run: Run, networks: Definitions, state: State) -> None:
    """Writes the run's final checkpoint and its `generator.safetensors`."""
    save_weights(run.checkpoints / FINAL, replicated(jax.tree.leaves(state)))
    generator = nnx.merge(networks.generator, *state.generator[:2])
    path = run.path / "generator.safetensors"
    with written(path):
        save_file(torch_layout(generator), path, {"format": "pt"})


def torch_layout(generator) -> dict[str, np.ndarray]:
    """The generator's arrays by the names and in the axis order of PyTorch."""
    arrays = {}
    for number, block in enumerate([*generator.blocks, generator.image]):
        kernel = np.asarray(block.kernel[...])  # height, width, outputs, inputs
        arrays[f"{3 * number}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    for number, norm in enumerate(generator.norms):
        name = f"{3 * number + 1}"
        arrays[f"{name}.weight"] = np.asarray(norm.scale[...])
        arrays[f"{name}.bias"] = np.asarray(norm.bias[...])
        arrays[f"{name}.running_mean"] = np.asarray(norm.mean[...])
        arrays[f"{name}.running_var"] = np.asarray(norm.var[...])
        arrays[f"{name}.num_batches_tracked"] = np.array(0)
    return arrays


def load_networks(run: Run) -> tuple[GANConfig, Definitions, State]:
    """Configuration and networks of a finished run.

    Raises:
      UserError: the run has no networks (committed runs come without them), or damaged ones.
    """
    config = {"precision": "float32"} | run.config  # runs of before there was a choice
    evidence = EvidenceConfig(**config.pop("evidence"))
    tuples = {name: tuple(value) for name, value in config.items() if isinstance(value, list)}
    cfg = GANConfig(**config | tuples | {"evidence": evidence})
    networks, state = initial(cfg, run.summary["channels"])
    leaves = load_weights(run.checkpoints / FINAL, jax.tree.leaves(state))
    return cfg, networks, jax.tree.unflatten(jax.tree.structure(state), leaves)
