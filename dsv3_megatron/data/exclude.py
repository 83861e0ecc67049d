"""What a run leaves out: documents by the place of the input that they come from, and samples by their numbers.

A line of ``data.exclude`` is a JSON object, ``{"source": ..., "file": ..., "row": ...}`` as ``dsv3 data trace`` prints
it (what else that prints is ignored), or ``{"samples": [first, stop]}``. An excluded document keeps its place, which is
empty and weighs nothing: every other document stays where it is, so that an exclusion can begin at any resume.
Excluded samples are stepped over.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_megatron.data.source.origins import Origin, find_documents
from dsv3_megatron.data.source.samples import MOST_SAMPLES, SampleRange
from dsv3_megatron.data.source.shard_table import ShardTable
from dsv3_megatron.data.source.shards import Manifest
from dsv3_megatron.run.handed import parse_json, read_bytes
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_MOST_BYTES, _MOST_LINE = 1 << 28, 1 << 16  # of a file of what is left out, and of a line of it
_NONE = np.zeros(0, dtype=np.int64)


class ExcludedDocument(NamedTuple):
    """A document by its origin, and the line that names it."""

    origin: Origin
    line: int


@dataclass(frozen=True)
class Exclusion:
    """A file of what is left out.

    Args:
        path: as it was given, for messages; "" = nothing is left out.
        text: the file, which belongs to the run whatever becomes of it.
        documents: in the order of their lines.
        samples: ascending, apart from each other.
    """

    path: str = ""
    text: str = ""
    documents: tuple[ExcludedDocument, ...] = ()
    samples: tuple[SampleRange, ...] = ()

    @property
    def sha256(self) -> str | None:
        """A digest of what is left out, whatever the order of lines; None = nothing."""
        if not self.documents and not self.samples:
            return None
        named = sorted({(d.origin.source, d.origin.file, d.origin.row) for d in self.documents})
        return hashlib.sha256(json.dumps([named, self.samples]).encode()).hexdigest()

    def __str__(self) -> str:
        named = len({document.origin for document in self.documents})
        counts = {"document": named, "sample": sum(stop - first for first, stop in self.samples)}
        said = (f"{count:,} {what}{'' if count == 1 else 's'}" for what, count in counts.items() if count)
        return f"{self.path} (sha256 {(self.sha256 or '-')[:8]}): {' and '.join(said) or 'nothing'}"


@dataclass(frozen=True)
class Excluded:
    """Documents that are left out, by their shards' numbers in the table; ascending in each."""

    by_shard: Mapping[int, np.ndarray] = field(default_factory=dict)

    def documents_of(self, shard: int) -> np.ndarray:
        """Return the numbers of a shard's documents that are left out, ascending: [documents] int64."""
        return self.by_shard.get(shard, _NONE)


def read_exclusion(path: str | Path) -> Exclusion:
    """Return what a file leaves out.

    Raises: DataError: it cannot be read, or a line is none of the two objects; the line is named.
    """
    try:
        text = read_bytes(Path(path), _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else why_unread(error)
        raise DataError(f"data.exclude = {path} cannot be read ({why}); name a file of JSON lines") from None
    documents, samples = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found = _parse(f"data.exclude = {path}, line {number}", line)
            if isinstance(found, Origin):
                documents.append(ExcludedDocument(found, number))
            else:
                samples.append(found)
    return Exclusion(str(path), text, tuple(documents), _joined(samples))


def find_excluded(folder: str | Path, manifest: Manifest, table: ShardTable, exclusion: Exclusion) -> Excluded:
    """Return where the documents of an exclusion lie. Its cost grows with the exclusion, not with the corpus.

    Raises: DataError: naming the first line whose source, file or row the folder does not have.
    """
    found: defaultdict[int, set[int]] = defaultdict(set)
    first_line: dict[Origin, int] = {}
    for origin, line in exclusion.documents:
        first_line.setdefault(origin, line)
    wrong: dict[int, str] = {}
    for origin in sorted(
        first_line, key=lambda origin: (origin.source, origin.file, origin.row)
    ):  # neighbours together
        try:
            places = find_documents(folder, manifest, table, origin.source, origin.file, origin.row)
        except DataError as error:
            places, wrong[first_line[origin]] = [], str(error.args[0])
        else:
            if not places:
                wrong[first_line[origin]] = (
                    f"row {origin.row} of {origin.file} gave source {origin.source} no document; remove the line"
                )
        for shard, document in places:
            found[shard].add(document)
    if wrong:
        line = min(wrong)
        raise DataError(f"data.exclude = {exclusion.path}, line {line}: {wrong[line]}")
    return Excluded({shard: np.asarray(sorted(documents), dtype=np.int64) for shard, documents in found.items()})


def _parse(here: str, line: str) -> Origin | SampleRange:
    try:
        value = parse_json(line, unique=True) if len(line) <= _MOST_LINE else None
    except ValueError:
        raise DataError(f"{here} is not JSON: {_short(line)}; {_FORM}") from None
    if isinstance(value, dict) and ("samples" in value) != ({"source", "file", "row"} <= value.keys()):
        if "samples" in value and (found := _sample_range(value["samples"])):
            return found
        if "samples" not in value and _is_origin(value):
            return Origin(value["source"], value["file"], value["row"])
    raise DataError(f"{here} names neither a document nor samples: {_short(line)}; {_FORM}")


def _sample_range(value: Any) -> SampleRange | None:
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return (value[0], value[1]) if whole and 0 <= value[0] < value[1] <= MOST_SAMPLES else None


def _is_origin(value: dict[str, Any]) -> bool:
    names = isinstance(value["source"], str) and isinstance(value["file"], str)
    return names and type(value["row"]) is int and value["row"] >= 0


def _joined(ranges: Sequence[SampleRange]) -> tuple[SampleRange, ...]:
    """Return the same samples as ranges in order that do not touch."""
    found: list[SampleRange] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((first, stop))
    return tuple(found)


def _short(line: str) -> str:
    return line.strip() if len(line.strip()) <= 60 else f"{line.strip()[:57]}..."


_FORM = 'write {"source": ..., "file": ..., "row": ...}, or {"samples": [first, stop]} with first < stop'
