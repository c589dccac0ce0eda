"""Medical images: MedMNIST by its own registry, or patches of a histology section offline."""

import dataclasses
import functools
import hashlib
import http.client
import importlib.util
import os
import re
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from experiment_runs import hosts
from experiment_runs.assignment import SUBMISSION
from experiment_runs.errors import UserError
from experiment_runs.files import fingerprint
from experiment_runs.npz import Header, read_npz
from experiment_runs.process import progress

HISTOLOGY = "histology"
SPLITS = ("train", "val", "test")
EVEN, ODD = SUBMISSION["even"], SUBMISSION["odd"]  # by the last digit of the student ID
TIMEOUT_SECONDS = 5  # to notice that there is no network
PATIENCE_SECONDS = 30  # for the first bytes of a download
LARGEST = 2**34  # bytes of a download; the largest set has 13 GB
SLOWEST = 10_000  # bytes a second of a download that is waited for
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
        """Of all that a run reads: labels and their names are part of what it finds."""
        labels = self.train_labels, self.held_out_labels
        return fingerprint(self.name, self.train, self.held_out, self.classes, *labels)


def dataset_for(student_id: str | None) -> str:
    """The images that the last digit of a student ID chooses; those of an even one without an ID.

    Raises:
      UserError: it is not as the assignment says.
    """
    if student_id is None:
        return EVEN
    rule = SUBMISSION["student_id"]
    if not re.fullmatch(rule, student_id) or not student_id[-1].isdecimal():
        raise UserError(
            f"student ID '{student_id}': not a number as the assignment has them ({rule}); its "
            "last digit chooses the images"
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
    if local and (local.exists() or local.is_symlink()):
        check_size(local, info[chosen], side)
        note = "" if md5(local) == checksum else ", not the official file (its MD5 differs)"
        return medmnist(local, chosen, side, f"{chosen}, from the local {local.name}{note}")
    try:
        with hosts.first_ahead(f"download of {url}"):
            path = download(url, checksum, f"{chosen}{suffix}.npz")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
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
      OSError, http.client.HTTPException: it cannot be fetched or written.
      UserError: its MD5 is not the registry's.
    """
    path = Path.home() / ".medmnist" / filename
    if path.is_file() and md5(path) == checksum:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{filename}.{os.getpid()}")
    try:
        fetch(url, scratch)
        if (found := md5(scratch)) != checksum:
            raise UserError(
                f"{url}: MD5 is {found}, the registry says {checksum}; download it again"
            )
        return scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def fetch(url: str, path: Path) -> None:
    """Downloads a file; a server that falls silent, or nearly so, is given up.

    Raises:
      OSError, http.client.HTTPException: it does not arrive, or not as fast as `SLOWEST`.
    """
    started, received = time.monotonic(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as remote:
        size = remote.headers.get("Content-Length", "")
        total = int(size) if size.isdecimal() and len(size) < 20 else None
        with path.open("wb") as file, progress(label=path.name, total=total) as bar:
            while block := remote.read1(1 << 20):
                file.write(block)
                bar.update(len(block))
                received += len(block)
                if received > LARGEST:
                    raise OSError(f"more than {LARGEST:,} bytes came")
                if time.monotonic() - started > PATIENCE_SECONDS + received / SLOWEST:
                    raise TimeoutError(f"slower than {SLOWEST / 1e3:.0f} kB a second")
    if total is not None and received < total:
        raise OSError(f"it ended after {received:,} of {total:,} bytes")


def check_size(path: Path, info: Mapping[str, Any], side: int) -> None:
    """Refuses what is no file, or larger than the set could be: it would be read for ever.

    Raises:
      UserError: names the path and what is there.
    """
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; put the npz file itself there")
    numbers = side * side * info["n_channels"] + 8 * len(info["label"])  # bytes of an image
    largest = sum(info["n_samples"].values()) * numbers + 2**20
    if path.stat().st_size > largest:
        raise UserError(
            f"{path}: {path.stat().st_size:,} bytes, the whole set has at most {largest:,}; "
            "download it again"
        )


def md5(path: Path) -> str:
    """MedMNIST publishes MD5 sums; they guard against damage, not against malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def medmnist(path: Path, name: str, side: int, source: str) -> ImageSet:
    """A MedMNIST file; its validation and test images are held out.

    What the file says of its arrays is checked before any of them is unpacked.

    Raises:
      UserError: not an npz file, or wrong keys, types, shapes or labels: all in one message.
    """
    info = registry().INFO[name]
    multi_label = info["task"].startswith("multi-label")
    columns = len(info["label"]) if multi_label else 1
    highest = 1 if multi_label else len(info["label"]) - 1
    arrays = read_npz(
        path,
        [f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")],
        functools.partial(header_problems, info=info, side=side, columns=columns),
    )
    problems = [
        f"{split}_labels runs from {labels.min()} to {labels.max()}, needs 0 to {highest}"
        for split in SPLITS
        if not 0 <= (labels := arrays[f"{split}_labels"]).min() <= labels.max() <= highest
    ]
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


def header_problems(
    headers: Mapping[str, Header], *, info: Mapping[str, Any], side: int, columns: int
) -> list[str]:
    """What is wrong with the types and shapes of a MedMNIST file, in words."""
    shape = (side, side) if info["n_channels"] == 1 else (side, side, 3)
    problems = []
    for split in SPLITS:
        images, labels = headers[f"{split}_images"], headers[f"{split}_labels"]
        count, most = next(iter(images.shape), 0), info["n_samples"][split]
        if images.dtype != np.uint8 or images.shape != (count, *shape) or not 0 < count <= most:
            problems.append(
                f"{split}_images is {images}, needs uint8[0 < n <= {most}, "
                f"{', '.join(map(str, shape))}]"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count, columns):
            problems.append(f"{split}_labels is {labels}, needs integers[{count}, {columns}]")
    return problems


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
