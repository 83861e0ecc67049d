"""Where a document comes from, and where a document of the input went: by (source, file, row), without an index."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.source.shard_table import ShardTable, fault_of_file
from dsv3_megatron.data.source.shards import ORIGIN, SPLITS, Manifest
from dsv3_megatron.run.handed import parse_json, read_bytes
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

FILES = "files.jsonl"
_LIST_BYTES, _LINE_BYTES = 1 << 29, 1 << 16  # of FILES, and of a line of it


@dataclass(frozen=True)
class Origin:
    """Where a document stood in the input.

    Args:
        source: its name in the manifest.
        file: path of the input file as prepare_data saw it.
        row: line or row of a table, from 1; 0 = the file is the document.
    """

    source: str
    file: str
    row: int


def document_origin(folder: str | Path, manifest: Manifest, table: ShardTable, shard: int, document: int) -> Origin:
    """Return where a document of a shard (by its number in the table) comes from.

    Raises: DataError: the folder does not say.
    """
    file, row = (int(value) for value in _origins(folder, table, shard)[document])
    source = manifest.sources[table.row(shard).source].name
    return Origin(source, _file(str(Path(folder) / source / FILES), file), row)


def find_documents(
    folder: str | Path, manifest: Manifest, table: ShardTable, source: str, file: str, row: int
) -> list[tuple[int, int]]:
    """Return the documents that come from a place of the input, as (shard, document): several where a line held
    several, none where the place gave none.

    Raises: DataError: the folder does not say, or has no such source or file.
    """
    names = [each.name for each in manifest.sources]
    if source not in names:
        raise DataError(f"source {source} is none of {folder}; its sources are: {', '.join(names)}")
    wanted = (_number(str(Path(folder) / source / FILES), file), row)
    found = []
    for split in SPLITS:
        shards = table.range_of(names.index(source), split)
        while shards:  # part by part: each is sorted by itself
            part = table.rows["part"][shards[0]]
            stop = bisect_right(shards, part, key=lambda n: table.rows["part"][n])
            found += _in_part(folder, table, shards[:stop], wanted)
            shards = shards[stop:]
    return found


def find_document(
    folder: str | Path, manifest: Manifest, table: ShardTable, source: str, file: str, row: int
) -> tuple[int, int] | None:
    """Return the first of :func:`find_documents`, None where there is none."""
    return next(iter(find_documents(folder, manifest, table, source, file, row)), None)


def _in_part(folder: str | Path, table: ShardTable, shards: range, wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the documents of ``wanted`` (file, row) in shards whose documents lie in the order of their origin."""

    def first_of(shard: int) -> tuple[int, int]:
        return int(table.rows["first_file"][shard]), int(table.rows["first_row"][shard])

    # The shard before the first that begins with it may end with it.
    place = max(0, bisect_left(shards, wanted, key=first_of) - 1)
    found = []
    for shard in shards[place:]:
        if first_of(shard) > wanted:
            break
        origins = _origins(folder, table, shard)
        here = range(len(origins))
        start, stop = (
            cut(here, wanted, key=lambda n: (int(origins["file"][n]), int(origins["row"][n])))
            for cut in (bisect_left, bisect_right)
        )
        found += [(shard, document) for document in here[start:stop]]
    return found


def _origins(folder: str | Path, table: ShardTable, shard: int) -> np.ndarray:
    row = table.row(shard)
    path = Path(folder) / f"{row.name}.origin.npy"
    if row.origin_sha256 is None:
        raise DataError(f"{folder} does not say where its documents come from: it is of an older version; prepare it "
                        "again")  # fmt: skip
    return _loaded(str(path), row.origin_sha256, row.documents)


@lru_cache(maxsize=64)  # a step's documents come from few shards again and again, and its pages are shared
def _loaded(path: str, sha256: bytes, documents: int) -> np.ndarray:
    """Return the origins [documents] of a shard; ``sha256`` tells one file of this path from another."""
    folder, name = Path(path).parent.parent, "/".join(Path(path).parts[-2:])
    if fault := fault_of_file(folder, name):
        raise DataError(f"{fault}; restore it or prepare the folder again")
    try:
        # mapped: of it a page is read, or as many as a search takes
        return open_npy(Path(path), ORIGIN, documents, mapped=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({why_unread(error)}); restore it or prepare the folder again"
        ) from None


def read_list(folder: Path, source: str) -> str:
    """Return the list of a source's input files, "" where there is none. Raises: DataError: it cannot be read."""
    path = folder / source / FILES
    if not os.path.lexists(path):
        return ""
    return _read_list(path).decode()


def _read_list(path: Path) -> bytes:
    try:
        if fault := fault_of_file(path.parent.parent, f"{path.parent.name}/{path.name}"):
            raise ValueError(fault)
        content = read_bytes(path, _LIST_BYTES)
        content.decode()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({why_unread(error)}); restore it or prepare the folder again"
        ) from None
    return content


class _Files:
    """The lines of a source's list of files, found without holding them as objects."""

    def __init__(self, path: str):
        self._path, self._data = path, _read_list(Path(path))
        ends = np.flatnonzero(np.frombuffer(self._data, dtype=np.uint8) == ord("\n"))
        self._starts = np.concatenate([[0], ends + 1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def path(self, number: int) -> str:
        """Return the path of an input file."""
        line = self._data[self._starts[number] : self._starts[number + 1]]
        try:
            found = parse_json(line) if len(line) <= _LINE_BYTES else None
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("path"), str):
            raise DataError(f'{self._path}, line {number + 1} is not {{"path": ...}}; restore it')
        return str(found["path"])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of every path; made for looking documents up, which tracing does not do."""
        return {self.path(number): number for number in range(len(self))}


@lru_cache(maxsize=8)
def _files(path: str, stamp: tuple[int, int]) -> _Files:
    return _Files(path)


def _open(path: str) -> _Files:
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it or prepare the folder again") from None
    return _files(path, (stat.st_size, stat.st_mtime_ns))


def _file(path: str, number: int) -> str:
    files = _open(path)
    if number >= len(files):
        raise DataError(f"{path} has {len(files)} lines, a document is of file {number}; restore it")
    return files.path(number)


def _number(path: str, file: str) -> int:
    try:
        return _open(path).numbers[file]
    except KeyError:
        raise DataError(f"file {file} is none of those that {path} lists") from None
