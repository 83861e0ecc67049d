"""Files that a command is asked to write."""

from __future__ import annotations

from pathlib import Path

from dsv3_megatron.run.files import write_atomically
from parallel.errors import RecipeError


def write_output(path: Path, text: str | bytes, key: str) -> None:
    """Write a file as a whole, in the place of a link too; a device or a pipe that was named is written to.

    Raises RecipeError naming ``key``, by which it was asked for, where that cannot be.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        else:
            write_atomically(path, text)
    except OSError as error:
        raise RecipeError(
            f"{key} = {path} cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None


def print_or_write(text: str, path: Path | None) -> None:
    """Print a text, or write it where ``output=`` says. Raises RecipeError when that cannot be written."""
    if path is None:
        print(text)
    else:
        write_output(path, text + "\n", "output")
