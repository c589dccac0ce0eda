"""Weights and tokenizers in: a safetensors directory, a hub id, the packaged GGUF, or random.

Every source ends as one table of tensors under Hugging Face names, checked whole against the
decoder that its configuration describes. Nothing here reads a pickle or runs a model's code.
"""

import json
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError
from safetensors.flax import load_file

from experiment_runs.errors import UserError
from experiment_runs.process import release_memory
from rlhf_jax.language_model.decoder import DecoderConfig
from rlhf_jax.pretrained.gguf_files import load_gguf
from rlhf_jax.pretrained.model import Pretrained, random_model
from rlhf_jax.pretrained.tensor_names import decoder_state
from rlhf_jax.pretrained.tokenizer import Tokenizer


def load(path: Path | None, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads what `find` found.

    Args:
      path: a directory, a GGUF file, or None for the random model.
      name: for the report.
      dtype: of the activations.

    Raises:
      UserError: the files do not fit together.
    """
    if path is None:
        return random_model(dtype)
    loaded = (load_gguf if path.is_file() else load_directory)(path, name=name, dtype=dtype)
    release_memory()  # of the files and of what they were converted from
    return loaded


def load_directory(path: Path, *, name: str, dtype: str = "float32") -> Pretrained:
    """Reads config.json, *.safetensors and the tokenizer's files."""
    config, tensors = read_directory(path)
    decoder = DecoderConfig.from_huggingface(config, dtype=dtype)
    tokenizer = Tokenizer.from_folder(path, embeddings=decoder.vocab_size)
    return Pretrained(
        name=name,
        origin=f"safetensors in {path.name}",
        config=decoder,
        huggingface_config=config,
        state=decoder_state(decoder, tensors, source=str(path)),
        tokenizer=tokenizer,
    )


def read_directory(path: Path) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """config.json and all tensors of a model directory.

    Raises:
      UserError: a file is missing or broken.
    """
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}/config.json: missing; name a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}/config.json: not JSON ({error})") from None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no *.safetensors; pickled weights (*.bin) are not read")
    tensors: dict[str, jax.Array] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return config, tensors
