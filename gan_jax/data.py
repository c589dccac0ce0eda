"""Medical images: MedMNIST by its own registry, or patches of a histology section offline."""

import dataclasses
import hashlib
import importlib.util
import os
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8

from reporting.runs import UserError, fingerprint, progress

HISTOLOGY = "histology"
SPLITS = ("train", "val", "test")
EVEN, ODD = "dermamnist", "chestmnist"
TIMEOUT_SECONDS = 5  # to notice that there is no network
PATCH_STRIDE = 7  # pixels between neighbouring patches of the section


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Training and held-out images of one set, in [0, 255].

    Labels are distributions over `classes`, so that one loss serves every MedMNIST task: an
    image of a multi-label set (ChestMNIST) spreads its mass evenly over its findings, or has
    all of it on "no finding". Without labels there are no classes.
    """

    name: str
    source: str  # a sentence for the report: where the images come from
    train: UInt8[np.ndarray, "train height width channels"]
    held_out: UInt8[np.ndarray, "held height width channels"]
    classes: tuple[str, ...] = ()
    train_labels: Float[np.ndarray, "train classes"] | None = None
    held_out_labels: Float[np.ndarray, "held classes"] | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.name, self.train, self.held_out)


def dataset_for(student_id: str | None) -> str:
    """DermaMNIST for an even last digit of the student ID (or without one), ChestMNIST for odd."""
    if student_id is None:
        return EVEN
    if not student_id.isdecimal():
        raise UserError(
            f"student ID '{student_id}': not a number; its last digit chooses the images"
        )
    return ODD if int(student_id[-1]) % 2 else EVEN


def load(name: str | None, *, side: int, data_dir: Path | None, student_id: str | None) -> ImageSet:
    """The images to train on.

    A set that is named must be there: in `data_dir`, in MedMNIST's own folder or on the network.
    Where no name is given the student ID chooses, and with neither file nor network the patches
    of scikit-image's section stand in; `source` says so.

    Raises:
      UserError: unknown name, broken file, or a named set that cannot be reached.
    """
    if name == HISTOLOGY:
        return histology(side, "asked for")
    chosen = name or dataset_for(student_id)
    info = registry().INFO
    flat = [key for key in info if not key.endswith("3d")]
    if chosen not in flat:
        known = ", ".join([*flat, HISTOLOGY])
        raise UserError(f"dataset '{chosen}': not a 2D MedMNIST set; use one of {known}")
    suffix = "" if side == 28 else f"_{side}"
    url, checksum = (info[chosen][key + suffix] for key in ("url", "MD5"))
    local = data_dir and Path(data_dir) / "medmnist" / f"{chosen}{suffix}.npz"
    if local and local.exists():
        note = "" if md5(local) == checksum else ", not the official file (its MD5 differs)"
        return medmnist(local, chosen, side, f"{chosen}, from the local {local.name}{note}")
    try:
        path = download(url, checksum, f"{chosen}{suffix}.npz")
    except OSError as error:
        reason = getattr(error, "reason", error)
        if name is not None:
            raise UserError(
                f"dataset '{name}': {url} cannot be fetched ({reason}); put the file into "
                f"{local or 'DATA_DIR/medmnist'} or leave the dataset to the student ID"
            ) from None
        print(f"{chosen}: {url} cannot be fetched ({reason})", file=sys.stderr)
        return histology(side, f"in place of {chosen}, which could not be fetched")
    return medmnist(path, chosen, side, f"{chosen}, the official file ({info[chosen]['license']})")


def registry() -> ModuleType:
    """MedMNIST's table of addresses, checksums and labels, without importing the package,
    whose `__init__` imports PyTorch.

    Raises:
      UserError: medmnist is not installed.
    """
    package = importlib.util.find_spec("medmnist")
    if package is None:
        raise UserError("package medmnist: missing; run `pip install --no-deps medmnist`")
    path = Path(package.submodule_search_locations[0]) / "info.py"
    spec = importlib.util.spec_from_file_location("medmnist_info", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def download(url: str, checksum: str, filename: str) -> Path:
    """The official file, in the folder that the medmnist package uses too.

    Raises:
      OSError: it cannot be fetched or written.
      UserError: its MD5 is not the registry's.
    """
    path = Path.home() / ".medmnist" / filename
    if path.exists() and md5(path) == checksum:
        return path
    scratch = path.with_name(f".{filename}.{os.getpid()}")
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as remote:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = remote.headers.get("Content-Length")
        with scratch.open("wb") as file, progress(label=filename, total=size and int(size)) as bar:
            while block := remote.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if (found := md5(scratch)) != checksum:
        scratch.unlink()
        raise UserError(f"{url}: MD5 is {found}, the registry says {checksum}; download it again")
    return scratch.replace(path)


def md5(path: Path) -> str:
    """MedMNIST publishes MD5 sums; they guard against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def medmnist(path: Path, name: str, side: int, source: str) -> ImageSet:
    """A MedMNIST file; its validation and test images are held out.

    Raises:
      UserError: not an npz file, or wrong keys, types, shapes or labels: all in one message.
    """
    info = registry().INFO[name]
    arrays = read_npz(path, [f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")])
    shape = (side, side) if info["n_channels"] == 1 else (side, side, 3)
    multi_label = info["task"].startswith("multi-label")
    columns = len(info["label"]) if multi_label else 1
    highest = 1 if multi_label else len(info["label"]) - 1
    problems = []
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            problems.append(
                f"{split}_images is {images.dtype}{list(images.shape)}, needs uint8[n > 0, "
                f"{', '.join(map(str, shape))}]"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images), columns):
            problems.append(
                f"{split}_labels is {labels.dtype}{list(labels.shape)}, needs integers"
                f"[{len(images)}, {columns}]"
            )
        elif labels.size and not 0 <= labels.min() <= labels.max() <= highest:
            problems.append(
                f"{split}_labels runs from {labels.min()} to {labels.max()}, needs 0 to {highest}"
            )
    if problems:
        raise UserError(f"{path}: not a {name} file of side {side}: {'; '.join(problems)}")
    images = {s: arrays[f"{s}_images"].reshape(-1, side, side, info["n_channels"]) for s in SPLITS}
    labels = {s: distributions(arrays[f"{s}_labels"], len(info["label"])) for s in SPLITS}
    return ImageSet(
        name=name,
        source=source,
        train=images["train"],
        held_out=np.concatenate([images["val"], images["test"]]),
        classes=tuple(info["label"].values()) + (("no finding",) if multi_label else ()),
        train_labels=labels["train"],
        held_out_labels=np.concatenate([labels["val"], labels["test"]]),
    )


def read_npz(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named arrays of a file; arrays of Python objects are refused, never unpickled."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                held = ", ".join(file.files) or "nothing"
                raise UserError(f"{path}: lacks {', '.join(missing)}; it holds {held}")
            return {name: file[name] for name in names}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise UserError(f"{path}: not a readable npz file of plain arrays ({error})") from None


def distributions(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels as rows that sum to 1; a multi-label row without findings goes to a last class."""
    if labels.shape[1] == 1:
        return np.eye(classes, dtype=np.float32)[labels[:, 0]]
    positive = np.column_stack([labels, labels.sum(axis=1) == 0]).astype(np.float32)
    return positive / positive.sum(axis=1, keepdims=True)


def histology(side: int, why: str) -> ImageSet:
    """Patches of the stained section that scikit-image carries, without labels.

    Training patches lie in the left three quarters of the section, held-out ones in the right
    quarter: patches overlap inside a region and never across.
    """
    from skimage.data import immunohistochemistry

    section = immunohistochemistry()
    border = section.shape[1] * 3 // 4
    return ImageSet(
        name=HISTOLOGY,
        source=f"patches of one immunohistochemistry section (scikit-image), {why}",
        train=patches(section[:, :border], side),
        held_out=patches(section[:, border:], side),
    )


def patches(
    section: UInt8[np.ndarray, "rows columns channels"], side: int
) -> UInt8[np.ndarray, "patch height width channels"]:
    """Every square of `side` pixels on a raster of `PATCH_STRIDE`, row by row."""
    windows = np.lib.stride_tricks.sliding_window_view(section, (side, side), axis=(0, 1))
    raster = windows[::PATCH_STRIDE, ::PATCH_STRIDE]  # rows, columns, channels, side, side
    return np.moveaxis(raster, 2, -1).reshape(-1, side, side, section.shape[2])
