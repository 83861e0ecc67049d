"""Files that a command is asked to write."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from dsv3_megatron.run.files import write_atomically
from parallel.errors import RecipeError


def write_output(path: Path, text: str | bytes, key: str) -> None:
    """Write a file as a whole, in the place of a link too; a device or a pipe that was named is written to, and so is
    what this process has open (/dev/stdout), be it a file that the shell has made.

    Raises RecipeError naming ``key``, by which it was asked for, where that cannot be.
    """
    try:
        if (descriptor := _descriptor(path)) is not None:
            sys.stdout.flush()
            with os.fdopen(os.dup(descriptor), "wb") as file:  # opened anew it would begin at the file's begin
                file.write(text.encode() if isinstance(text, str) else text)
        elif path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        else:
            write_atomically(path, text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RecipeError(
            f"{key} = {path} cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from None


def _descriptor(path: Path) -> int | None:
    """Return which of this process's open files a path names; None where it is another."""
    named = {"/dev/stdout": "1", "/dev/stderr": "2"}.get(str(path), "")
    found = re.fullmatch("(?:/dev|/proc/self)/fd/([0-9]{1,6})", str(path))
    number = found[1] if found else named
    return int(number) if number else None


def print_or_write(text: str, path: Path | None) -> None:
    """Print a text, or write it where ``output=`` says. Raises RecipeError when that cannot be written."""
    if path is None:
        print(text)
    else:
        write_output(path, text + "\n", "output")
