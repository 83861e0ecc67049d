"""A rank's share of a state of the run, as files in memory: those of a checkpoint, and a manifest of their own.

A share holds what the rank reads when it resumes in the same layout, so that it needs nobody else's: all boxes of its
run of every parameter, also those that on a disk another tensor-parallel rank saves, and what several ranks hold alike
where this one reads it for all. Which boxes those are, in which order, is the share's *cut*: a rank of the same cut
knows where everything lies.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.index import Described, Places, describe_pieces
from dsv3_megatron.checkpoint.manifest import (
    MANIFEST,
    RECIPE,
    USE_OLDER,
    DamageError,
    FileFacts,
    manifest_text,
    problems,
    read_content,
)
from dsv3_megatron.checkpoint.memory.folder import State
from dsv3_megatron.checkpoint.piece_files import write_file
from dsv3_megatron.checkpoint.write import ShareFile, share_name, write_share
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.run.files import write_atomically

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Memory(BaseModel):
    """What the manifest of a share says beside that of a checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid")

    run: str
    life: str
    rank: _Count
    world: _Count
    cut: str
    places: dict[str, list[Annotated[list[_Count], Field(min_length=2, max_length=2)]]]


@dataclass(frozen=True)
class Share:
    """A rank's share in memory, as its manifest describes it."""

    folder: Path
    content: dict[str, Any]

    @property
    def state(self) -> State:
        """The state that it is of."""
        return State(self.content["progress"]["step"], self.content["memory"]["life"])

    @property
    def run(self) -> str:
        """The id of the run."""
        return self.content["memory"]["run"]

    @property
    def rank(self) -> int:
        """Whose share it is."""
        return self.content["memory"]["rank"]

    @property
    def world(self) -> int:
        """How many ranks there were."""
        return self.content["memory"]["world"]

    @property
    def cut(self) -> str:
        """Of the boxes that it holds (:func:`cut_of`)."""
        return self.content["memory"]["cut"]

    @property
    def files(self) -> FileFacts:
        """Its files."""
        return self.content["files"]

    def damage(self) -> str | None:
        """Return the first thing that is wrong with its files; None where all are as they were written."""
        return next(problems(self.folder, self.files), None)

    def found(self, states: dict[str, list[Entry]]) -> Found:
        """Return it as a checkpoint that this rank alone reads, of these states, whose cut it has."""
        places = {name: [(start, length) for start, length in each] for name, each in self._places.items()}
        return Found.of(self.folder, self.content, _index(states, self.rank, places))

    @property
    def _places(self) -> dict[str, list[list[int]]]:
        return self.content["memory"]["places"]


def read_here(states: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Return of the states that a rank saves what it is to read itself when it resumes."""
    return {holds: [entry for entry in entries if entry.is_read_here] for holds, entries in states.items()}


def cut_of(states: dict[str, list[Entry]]) -> str:
    """Return a checksum of the boxes of a share (:func:`read_here`) and of their order."""
    boxes = [(holds, e.key, e.whole, e.start, e.extent, str(e.tensor.dtype)) for holds in states for e in states[holds]]
    return xxhash.xxh3_128_hexdigest(repr(boxes).encode())


def _index(states: dict[str, list[Entry]], rank: int, places: Places) -> Metadata:
    """Return where the boxes of a share lie."""
    boxes = {
        share_name(rank, number): [Described(e.key, e.whole, e.start, e.extent, e.tensor.dtype) for e in entries]
        for number, entries in enumerate(states.values())
        if entries
    }
    return describe_pieces(boxes, places)


def write(
    folder: Path,
    files: list[ShareFile],
    recipe: str,
    progress: dict[str, Any],
    facts: dict[str, Any],
    memory: dict[str, Any],
    stop: threading.Event | None = None,
) -> Share:
    """Write this rank's share into ``folder``, the manifest last: without one a folder is no share.

    Args:
        facts: what the manifest of a checkpoint says beside progress and files.
        memory: run, life, rank, world, cut.
    Raises: OSError: there is no room. GivenUp: ``stop`` was set.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
    written = write_share(files, folder, stop)
    written.files[RECIPE] = write_file(folder / RECIPE, recipe.encode())
    places = {name: [list(place) for place in each] for name, each in written.places.items()}
    text = manifest_text(progress, written.files, {**facts, "memory": {**memory, "places": places}})
    write_atomically(folder / MANIFEST, text)
    return read(folder)


def read(folder: Path) -> Share:
    """Return the share in a folder. Raises DamageError: there is none, or its manifest is not what was written."""
    content = read_content(folder, whole=False)
    try:
        memory = _Memory.model_validate(content.get("memory"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("memory", *first["loc"])))
        raise DamageError(f"{folder / MANIFEST}: {place}: {first['msg']}; {USE_OLDER}") from None
    if memory.places.keys() != content["files"].keys() - {RECIPE}:
        raise DamageError(f"{folder / MANIFEST} does not say where pieces lie; {USE_OLDER}")
    return Share(folder, content)
