"""Numbers for W&B's rows, each larger than every one before it, over all starts of a run."""

from __future__ import annotations

import re
from pathlib import Path

from dsv3_megatron.run.handed import read_text
from dsv3_megatron.run.resilient import ResilientFiles

_BLOCK = 100  # rows between two writes; as many numbers at most stay unused when a run is killed


class RowNumbers:
    """W&B drops a row whose number ("step") is not larger than the last one's, wherever that came from.

    A training step cannot be that number: after a rollback, or a restart from an older checkpoint, steps are done
    again, and an evaluation shares its step with the step. The number says nothing, training step and tokens are
    columns. The file holds the first number that no start has taken.
    """

    def __init__(self, path: Path, files: ResilientFiles):
        self._path, self._files = path, files
        self._next = self._end = _stored(path)

    def take(self) -> int:
        """Return the next number."""
        if self._next == self._end:
            self._end += _BLOCK
            self._files.replace(self._path, f"{self._end}\n")
        self._next += 1
        return self._next - 1


def _stored(path: Path) -> int:
    """Return the number in a file, 0 where there is none."""
    try:
        text = read_text(path, 1000).strip() if path.exists() else ""
    except (OSError, ValueError):
        return 0
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else 0
