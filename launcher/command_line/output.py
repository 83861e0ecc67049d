"""Files that a command is asked to write."""

from __future__ import annotations

from pathlib import Path

from parallel.errors import RecipeError


def write_output(path: Path, text: str, key: str) -> None:
    """Write a file. Raises RecipeError naming ``key``, by which it was asked for, where that cannot be."""
    try:
        path.write_text(text)
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
