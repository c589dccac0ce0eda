"""Arrays in an npz file: what it says of itself is checked before anything is unpacked."""

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiment_runs.errors import UserError, first_line

# What zipfile, zlib and NumPy raise for files that are damaged, encrypted, oddly compressed or
# nested without end.
UNREADABLE = (
    ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError, KeyError,
    IndexError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError,
)  # fmt: skip

LONGEST_HEADER = 2**16  # bytes of an array's type and shape; NumPy itself takes 10,000
LARGEST = 2**29  # bytes of the arrays that a run keeps in a file


class Header(NamedTuple):
    """What an array in a file says of itself."""

    dtype: np.dtype
    shape: tuple[int, ...]

    def __str__(self):
        return f"{str(self.dtype):.60}{list(self.shape[:6])}"


def read_npz(
    path: Path,
    names: Sequence[str] | None = None,
    problems_of: Callable[[Mapping[str, Header]], list[str]] = lambda headers: [],
) -> dict[str, np.ndarray]:
    """The named arrays of an npz file; Python objects are refused, never unpickled.

    Args:
      path: the file.
      names: of the arrays; None takes them all.
      problems_of: what is wrong with them by their headers, before anything is unpacked.

    Raises:
      UserError: not such a file, or it has problems.
    """
    if not path.is_file() and path.exists():
        raise UserError(f"{path}: not a regular file; put the npz file itself there")
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist() if name[-4:] == ".npy"]
            names = held if names is None else names
            if missing := [name for name in names if name not in held]:
                shown = ", ".join(held[:20]) or "nothing"
                raise UserError(f"{path}: lacks {', '.join(missing)}; it holds {shown}")
            headers = {name: npy_header(archive, name) for name in names}
            if problems := problems_of(headers):
                raise UserError(f"{path}: does not fit: {'; '.join(problems)}")
            return {name: npy_array(archive, name, headers[name]) for name in names}
    except UNREADABLE as error:
        raise UserError(
            f"{path}: not a readable npz file of plain arrays ({first_line(error)}); "
            "write it with numpy.savez_compressed or download it again"
        ) from None


def too_large(headers: Mapping[str, Header]) -> list[str]:
    """What is wrong with the arrays of a run: they are more than one keeps."""
    size = sum(math.prod(own.shape) * own.dtype.itemsize for own in headers.values())
    return [f"{size:,} bytes of arrays, a run keeps {LARGEST:,} at most"] * (size > LARGEST)


def npy_header(archive: zipfile.ZipFile, name: str) -> Header:
    """Type and shape of an array in an npz file, without unpacking the array."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed by method {member.compress_type}, needs deflate")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(LONGEST_HEADER))  # NumPy reads one of any length
        version = np.lib.format.read_magic(start)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name} is of format {version}, needs 1.0 or 2.0")
        shape, _, dtype = readers[version](start)
        left = member.file_size - start.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if math.prod(shape) * dtype.itemsize > left:
        raise ValueError(f"{name} is shorter than its shape {list(shape)} says")
    return Header(dtype, shape)


def npy_array(archive: zipfile.ZipFile, name: str, header: Header) -> np.ndarray:
    """The array; one that says something else of itself when it is read again is refused."""
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if Header(array.dtype, array.shape) != header:
        raise ValueError(f"{name} changed while it was read")
    return array
