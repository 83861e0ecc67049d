"""Which states in memory are of the run as it is now: ``memory.json`` in the run directory.

A run has lives: one begins with each start, and with each roll-back. Once the run has resumed from something older - a
checkpoint on disk, when memory was lost with a node - what the life before kept in memory counts no longer, but a node
that comes back may still hold it. So the run directory, which all lives share, names the last life that has begun and
the state that it has begun with. Nothing else that memory holds of this run may be loaded.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.checkpoint.memory.folder import State
from dsv3_megatron.run.files import write_json
from dsv3_megatron.run.handed import read_json_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import CheckpointError


class _Begun(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: Annotated[int, Field(ge=0, lt=1 << 48)]
    life: str


class _Content(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    run: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    life: str | None = None
    begun_with: _Begun | None = None


@dataclass(frozen=True)
class Lives:
    """The id of a run and its last life.

    Attributes:
        life: the last that has begun; None where none has.
        begun_with: the state in memory that it has begun with; None where it has begun with none.
    """

    run: str
    life: str | None = None
    begun_with: State | None = None

    def may_load(self, state: State) -> bool:
        """Return whether a state in memory is of the run as it is now."""
        return state.life == self.life or state == self.begun_with

    def write(self, path: Path) -> None:
        """Put it on the disk. Raises OSError."""
        begun = self.begun_with and self.begun_with._asdict()
        write_json(path, {"run": self.run, "life": self.life, "begun_with": begun})


def read_lives(path: Path) -> Lives:
    """Return the lives of a run, of a new one where there is no file yet.

    Raises: CheckpointError: the file is not what was written.
    """
    try:
        content = _Content.model_validate(read_json_file(path))
    except FileNotFoundError:
        return Lives(uuid.uuid4().hex[:16])
    except (OSError, ValidationError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({why_unread(error)}); remove it, and the run resumes from its disk"
        ) from None
    begun = None if content.begun_with is None else State(content.begun_with.step, content.begun_with.life)
    return Lives(content.run, content.life, begun)


def leave_behind(path: Path, note: Callable[[str], None]) -> None:
    """Let nothing that memory holds of the run count any longer: it trains without, and none of those states has what
    it does from here on. Called by rank 0. ``note``: gets a line where there may be some.

    Raises: CheckpointError: the file is not what was written. OSError: it cannot be written.
    """
    if not path.exists() or (lives := read_lives(path)).life is None:
        return
    Lives(lives.run).write(path)
    note("checkpoint.memory_every_steps = 0: states of this run that nodes still hold in memory count no longer")


def new_life() -> str:
    """Return the name of a life that begins."""
    return uuid.uuid4().hex[:8]
