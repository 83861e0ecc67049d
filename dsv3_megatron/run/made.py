"""Files that are made or opened for writing: never through a link that somebody else has put in their place.

A folder that several may write, or that was handed over, can hold a link under a name that a program is about to
write; writing through it would change a file elsewhere. Permissions are those of the umask, which every command sets
(:func:`for_owner`).
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import BinaryIO, Literal

from dsv3_megatron.run.handed import regular_descriptor

_USERS = "DSV3_UMASK"  # environment variable: the umask of the shell that started the first of our processes
Readers = Literal["owner", "group"]
_UMASKS: dict[Readers, int] = {"owner": 0o077, "group": 0o027}


def for_owner(readers: Readers = "owner") -> None:
    """From here on this process and its children make files for their owner alone, or for the group to read too.

    Whatever the umask forbids that the user's shell has set stays forbidden. Processes that this one starts, and a job
    that it submits, find that one in the environment: theirs is this process's.
    """
    before = os.umask(_UMASKS["owner"])
    users = os.environ.setdefault(_USERS, f"{before:o}")
    os.umask(_UMASKS[readers] | (int(users, 8) if re.fullmatch("[0-7]{1,3}", users) else before))


def new_file(path: Path) -> BinaryIO:
    """Make a file for writing. What an earlier, killed writer left under the name is removed first, a link too.

    Raises OSError: it cannot be made, or another process makes it at the same time.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def appended_file(path: Path) -> BinaryIO:
    """Open a file, unbuffered, to read it and to write at its end; make it where there is none.

    Raises OSError: it cannot be opened, or is a link or no regular file.
    """
    try:
        descriptor = regular_descriptor(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, and nothing is written through one", str(path)) from None
        raise
    return os.fdopen(descriptor, "a+b", buffering=0)
