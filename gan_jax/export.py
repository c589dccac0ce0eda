"""Trained networks on disk: both for this library, the generator for PyTorch as well.

`generator.safetensors` is the state of a plain `nn.Sequential`. To draw images from it:

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
    images = generator(torch.randn(32, weights["0.weight"].shape[0], 1, 1))  # in [-1, 1]
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from safetensors.numpy import save_file

from gan_jax.config import EvidenceConfig, GANConfig
from gan_jax.training import Definitions, State, initial
from reporting.runs import Run, UserError


def save_networks(run: Run, networks: Definitions, state: State) -> None:
    """Writes the run's final checkpoint and its `generator.safetensors`."""
    with ocp.StandardCheckpointer() as checkpointer:
        path = (run.checkpoints / "final").absolute()
        checkpointer.save(path, jax.tree.leaves(state), force=True)
    generator = nnx.merge(networks.generator, *state.generator[:2])
    save_file(torch_layout(generator), run.path / "generator.safetensors", {"format": "pt"})


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
      UserError: the run has no networks (committed runs come without checkpoints).
    """
    config = dict(run.config)
    evidence = EvidenceConfig(**config.pop("evidence"))
    tuples = {name: tuple(value) for name, value in config.items() if isinstance(value, list)}
    cfg = GANConfig(**config | tuples | {"evidence": evidence})
    path = (run.checkpoints / "final").absolute()
    if not path.exists():
        raise UserError(f"{path}: no networks there; train the run on this machine first")
    networks, state = initial(cfg, run.summary["channels"])
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(path, jax.tree.leaves(state))
    return cfg, networks, jax.tree.unflatten(jax.tree.structure(state), leaves)
