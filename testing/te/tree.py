"""Where the wheel of Transformer Engine's Python lies: unpacked beside the environment, never installed into it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PINNED = Path(__file__).with_name("requirements.txt")


def pinned_version() -> str:
    """Return the version that requirements.txt names."""
    (line,) = (line for line in _PINNED.read_text().splitlines() if line and not line.startswith("#"))
    return line.split("==")[1].split()[0]  # its hash follows


def tree() -> Path:
    """Return the folder that holds ``transformer_engine/`` and its ``dist-info``; TE_TREE names another one.

    Raises: FileNotFoundError: it is not there, or of another version.
    """
    folder = Path(os.environ.get("TE_TREE", Path(sys.prefix) / "te")).absolute()  # programs change their directory
    if not (folder / f"transformer_engine-{pinned_version()}.dist-info").is_dir():
        raise FileNotFoundError(
            f"{folder} does not hold transformer_engine {pinned_version()} unpacked; run `make env`, which fetches it"
        )
    return folder


def has_bindings(folder: Path) -> bool:
    """Return whether a folder holds the compiled half too, as the ``site-packages`` of a GPU machine does."""
    return any(folder.glob("transformer_engine_torch-*.dist-info"))
