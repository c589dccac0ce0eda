"""Where files from outside are read by libraries from outside: one message for all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from experiment_runs.errors import UserError, first_line


@contextlib.contextmanager
def readable(what: object, kind: str) -> Iterator[None]:
    """Inside, anything but a message of ours becomes one; each names what is read.

    The readers of these files (tokenizers, jinja2, safetensors, gguf, orbax, datasets) raise errors
    of any kind for what is broken, and share no class of them.

    Args:
      what: is read: a path or the id of a repository.
      kind: what it should be, for the message.

    Raises:
      UserError: it cannot be read.
    """
    try:
        yield
    except UserError as error:
        if str(what) in str(error):
            raise
        raise UserError(f"{what}: {error}") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise UserError(
            f"{what}: cannot be read as {kind} ({type(error).__name__}: {first_line(error)}); "
            "download it again or name another"
        ) from error


def check_fetched(path: Path) -> None:
    """Refuses the few lines that git leaves in the place of a large file without Git LFS.

    Raises:
      UserError: names the file and the command that fetches it.
      OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(100).startswith(b"version https://git-lfs.github.com/"):
            raise UserError(
                f"{path}: git has left a pointer in its place; fetch the file itself with "
                "`git lfs install && git lfs pull` in its folder"
            )
