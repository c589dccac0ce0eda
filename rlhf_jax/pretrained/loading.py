"""Weights and tokenizers in: a safetensors directory, a hub id, the packaged GGUF, or random.

Every source ends as one table of tensors under Hugging Face names, checked whole against the
decoder that its configuration describes. Nothing here reads a pickle or runs a model's code.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import safe_open

from experiment_runs.errors import UserError, first_line
from experiment_runs.files import json_object, read_whole
from experiment_runs.foreign import readable
from experiment_runs.precision import resolved
from experiment_runs.process import release_memory
from rlhf_jax.language_model.decoder import DecoderConfig
from rlhf_jax.pretrained.gguf_files import load_gguf
from rlhf_jax.pretrained.hub import model_files
from rlhf_jax.pretrained.model import Pretrained, random_model
from rlhf_jax.pretrained.tensor_names import StoredTensor, decoder_state, leaf_name
from rlhf_jax.pretrained.tokenizer import Tokenizer

FLOATS = {"F64", "F32", "F16", "BF16"}


def load(path: Path | None, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads what `find` found.

    Args:
      path: a directory, a GGUF file, or None for the random model.
      name: for the report.
      dtype: the precision, "auto" for what the machine is fast in.

    Raises:
      UserError: the files do not fit together.
    """
    dtype = resolved(dtype)
    if path is None:
        return random_model(dtype)
    if path.is_dir():
        model_files(path)
    with readable(path, "a model"):
        loaded = (load_gguf if path.is_file() else load_directory)(path, name=name, dtype=dtype)
    check_weights(loaded.state, path)
    release_memory()  # of the files and of what they were converted from
    return loaded


def check_weights(state: nnx.State, path: Path) -> None:
    """Refuses weights that are not numbers, which would be blamed on the learning rate later.

    Raises:
      UserError: names the tensors.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if wrong := [leaf_name(at) for at, leaf in leaves if not jnp.isfinite(leaf).all()]:
        raise UserError(
            f"{path}: {len(wrong)} tensors hold values that are not finite, {', '.join(wrong[:5])}"
            "; download the weights again"
        )


def load_directory(path: Path, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads config.json, the tokenizer's files and *.safetensors, small things first."""
    config = read_config(path)
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    tokenizer = Tokenizer.from_folder(path, embeddings=decoder.vocab_size)
    return Pretrained(
        name=name,
        origin=f"safetensors in {path.name}",
        config=decoder,
        huggingface_config=config,
        state=decoder_state(decoder, stored_tensors(path), source=str(path)),
        tokenizer=tokenizer,
    )


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
      UserError: it is missing or no JSON object, or the directory is that of an adapter or a run.
    """
    if (adapter := path / "adapter_config.json").exists():
        raise UserError(
            f"{adapter}: adapters are not read; merge this one into its model (PEFT's "
            "merge_and_unload; `export --merged` for one of ours) and name the folder of that"
        )
    try:
        config = json_object(read_whole(path / "config.json"))
    except FileNotFoundError:
        inside = [*path.glob("*/config.json"), *path.glob("*/*/config.json")]
        near = sorted([*path.glob("*.gguf"), *(file.parent for file in inside)])
        which = f", such as {near[0]}" if near else ""
        raise UserError(
            f"{path}/config.json: missing; name a Hugging Face model folder or a GGUF file{which}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}/config.json: not JSON ({first_line(error)})") from None
    if {"stage", "identity", "inputs"} <= config.keys():
        raise UserError(
            f"{path}: a run, not a model; write its model with `python -m rlhf_jax export {path} "
            "--merged --out FOLDER`, or call again what trained it"
        )
    return config


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory: in the files that its index names, if it has one, else in
    model.safetensors, else in all, which may be shards.

    Raises:
      UserError: a file is missing or broken, holds numbers that are no floats, or holds a tensor
        that another file holds too.
    """
    place = tensor_places(path)
    # macOS leaves files of this name beside others on foreign disks
    found = {file.name for file in path.glob("*.safetensors") if not file.name.startswith("._")}
    files = sorted(set(place.values()) or {"model.safetensors"} & found or found)
    if not files:
        raise UserError(f"{path}: no *.safetensors; pickled weights (*.bin) are not read")
    if missing := set(files) - found:
        raise UserError(f"{path}: lacks {sorted(missing)}, which its index names; fetch them again")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with readable(path / file, "a whole safetensors file"):
            opened = safe_open(path / file, framework="numpy")
            names = opened.keys()
            parts = {name: opened.get_slice(name) for name in names}
            check_kinds(path / file, {name: part.get_dtype() for name, part in parts.items()})
        own = {
            name: StoredTensor(tuple(part.get_shape()), functools.partial(opened.get_tensor, name))
            for name, part in parts.items()
            if place.get(name, file) == file
        }
        if twice := sorted(own.keys() & tensors.keys()):
            raise UserError(
                f"{path / file}: {twice[0]} is in another file, too, and there is no index to say "
                "which one counts; remove the files of the older save"
            )
        tensors |= own
    return tensors


def tensor_places(path: Path) -> dict[str, str]:
    """The file of every tensor by a directory's index; empty where there is none."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return {}
    try:
        places = json_object(read_whole(index))["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, RecursionError, AttributeError) as error:
        raise UserError(f"{index}: not an index with a weight_map ({error!r})") from None


def check_kinds(file: Path, kinds: Mapping[str, str]) -> None:
    """Refuses tensors of numbers whose meaning is in some quantization's scales."""
    if foreign := {name: kind for name, kind in kinds.items() if kind not in FLOATS}:
        name, kind = next(iter(foreign.items()))
        raise UserError(
            f"{file}: {name} and {len(foreign) - 1} more tensors are {kind}, not one of "
            f"{sorted(FLOATS)}; use the model's weights that are not quantized"
        )
