"""Packings on disk: made once with the shards, or by the ranks of a run, each a share; read at places, never mapped.

A packing is a function of the shards, the sequence length and fill-in-the-middle, not of a run's seed:

    packing/KEY/SOURCE/SPLIT_00000.pack     the packings of some shards in a row, at most ``FILES`` files of all shards
    packing/KEY/SOURCE/SPLIT.npy            [shards + 1]: sequences before each, and where its packing begins

They lie beside the shards, or in data.cache where that folder cannot be written. A file appears under its name as a
whole. Whoever makes one that another has made meanwhile replaces it by the same bytes, so no lock is needed on any file
system. SPLIT.npy comes last, when all files are there: a packing is ready when that is there.

A .pack file is ``_HEAD``, (pieces, sequences) uint64 of each shard, and for each shard its ``starts`` and ``pieces``.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing import PIECE, PackingRule, pack
from dsv3_megatron.data.source.shard_table import ShardTable
from dsv3_megatron.data.source.shards import Split, read_lengths
from parallel.errors import DataError

VERSION = 2  # of what a packing holds: another one has another folder
FILES = 4096  # at most, and one more for each source and split: few inodes, and enough work for many ranks
PACKINGS = "packing"
_HEAD = struct.Struct("<8sII")  # magic, version, shards
_MAGIC = b"dsv3pack"
_COUNTS = np.dtype([("pieces", "<u8"), ("sequences", "<u8")])
_INDEX = np.dtype([("sequences", "<u8"), ("place", "<u8")])  # before a shard; of its packing in its file, in bytes
_START = np.dtype("<u4")
_THREADS = 32  # for looking at files: a network file system answers many at once


def key_of_rule(table_sha256: str, rule: PackingRule) -> str:
    """Return the name of the folder of a packing: what it is made of decides it, and a person can read it."""
    marks = (rule.fim.begin, rule.fim.hole, rule.fim.end) if rule.fim_rate and rule.fim is not None else None
    what = f"{VERSION}/{FILES}/{table_sha256}/{rule.sequence_length}/{rule.fim_rate!r}/{marks}"
    digest = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    return f"{rule.sequence_length}_fim{rule.fim_rate:g}_{digest}"


@dataclass(frozen=True)
class PackingFiles:
    """The packing of a source's split, there or still to be made.

    Args:
        folder: of the shards.
        place: folder of packings (:func:`choose_place`).
        table_sha256: of the manifest.
        source: its number in the manifest.
        rule: of the training text; that of the held-out text follows.
    """

    folder: Path
    place: Path
    table: ShardTable
    table_sha256: str
    vocab_size: int
    source: int
    split: Split
    rule: PackingRule

    @property
    def shards(self) -> range:
        """The shards by their numbers in the table."""
        return self.table.range_of(self.source, self.split)

    @property
    def shards_a_file(self) -> int:
        """How many shards' packings lie in a file."""
        return max(1, -(-len(self.table) // FILES))

    @property
    def files(self) -> int:
        """How many .pack files there are."""
        return -(-len(self.shards) // self.shards_a_file)

    @property
    def index(self) -> Path:
        """The file whose being there says that the packing is ready."""
        return self._base / f"{self.split}.npy"

    @property
    def _base(self) -> Path:
        key = key_of_rule(self.table_sha256, self.rule.of(self.split))
        return self.place / key / self.table.names[self.source]

    def file(self, number: int) -> Path:
        """Return a .pack file."""
        return self._base / f"{self.split}_{number:05d}.pack"

    def shards_of(self, number: int) -> range:
        """Return the shards of a .pack file."""
        return self.shards[number * self.shards_a_file : (number + 1) * self.shards_a_file]

    def is_made(self, number: int) -> bool:
        """Return whether a .pack file is there, and whole."""
        return self._counts(number) is not None

    def make(self, number: int) -> None:
        """Write a .pack file, unless it is there. Raises DataError: a shard is damaged, or the place has no room."""
        if self.is_made(number):
            return
        rule = self.rule.of(self.split)
        packings = [pack(self.lengths(shard), rule, self.table.bin_sha256(shard)) for shard in self.shards_of(number)]
        with _replacing(self.file(number)) as temporary, temporary.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, VERSION, len(packings)))
            counts = [(len(p.pieces), len(p.starts) - 1) for p in packings]
            file.write(np.asarray(counts, dtype=_COUNTS).tobytes())
            for packing in packings:
                file.write(packing.starts.astype(_START).tobytes())
                file.write(packing.pieces.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def lengths(self, shard: int) -> np.ndarray:
        """Return the lengths [documents] int64 of a shard's documents, read from its .idx.

        Raises: DataError: the file is not what the table says.
        """
        return read_lengths(self.folder, self.table.row(shard), self.vocab_size)

    def missing(self) -> list[Path]:
        """Return the .pack files that are not there, or not whole."""
        with ThreadPoolExecutor(_THREADS) as pool:
            made = list(pool.map(self.is_made, range(self.files)))
        return [self.file(number) for number, there in enumerate(made) if not there]

    def seal(self) -> None:
        """Write the index, once all files are there. Raises DataError: some are not."""
        if self.index.exists():
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            counts = list(pool.map(self._counts, range(self.files)))
        if lacking := [self.file(number) for number, found in enumerate(counts) if found is None]:
            raise DataError(
                f"{len(lacking)} of {self.files} packings are missing, such as {lacking[0]}: where {self.folder} "
                "cannot be written, data.cache must be a folder that all nodes share, or dsv3 data pack makes them "
                "beforehand"
            )
        index = np.zeros(len(self.shards) + 1, dtype=_INDEX)
        at = 0
        for found in counts:
            assert found is not None, "none is lacking"
            sizes = (found["sequences"] + 1) * _START.itemsize + found["pieces"] * PIECE.itemsize
            here = slice(at, at + len(found))
            index["place"][here] = _body(len(found)) + np.cumsum(sizes) - sizes
            index["sequences"][at + 1 : at + 1 + len(found)] = found["sequences"]
            at += len(found)
        index["sequences"] = np.cumsum(index["sequences"])
        with _replacing(self.index) as temporary, temporary.open("wb") as file:
            np.save(file, index)
            file.flush()
            os.fsync(file.fileno())
        self.tidy()

    def tidy(self) -> None:
        """Remove what makers that were killed have left, of a packing that is ready: nobody needs it any more."""
        for left in self._base.glob(f"{self.split}*.partial"):
            with suppress(OSError):  # a folder that cannot be written is read all the same
                left.unlink(missing_ok=True)

    def _counts(self, number: int) -> np.ndarray | None:
        """Return (pieces, sequences) of the shards of a .pack file; None where it is not there, or torn."""
        shards = len(self.shards_of(number))
        try:
            with self.file(number).open("rb") as file:
                head, counts = file.read(_HEAD.size), np.fromfile(file, dtype=_COUNTS, count=shards)
                size = os.fstat(file.fileno()).st_size
        except OSError:
            return None
        if head != _HEAD.pack(_MAGIC, VERSION, shards) or len(counts) != shards:
            return None
        body = int(((counts["sequences"] + 1) * _START.itemsize + counts["pieces"] * PIECE.itemsize).sum())
        return counts if size == _body(shards) + body else None


def _body(shards: int) -> int:
    """Return where the packings begin in a .pack file, in bytes."""
    return _HEAD.size + shards * _COUNTS.itemsize


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then takes the place of ``path``. Raises DataError: it cannot be written."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except FileNotFoundError:
            if not path.exists():  # else another maker was first, found all there, and has tidied up
                raise
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"packing {path} cannot be written ({error.strerror}); make room, or name another data.cache"
        ) from None


def choose_place(folder: str | Path, cache: str | Path) -> Path:
    """Return where packings of a folder are kept: beside the shards, or in the cache where that cannot be written.

    Ask one process and tell the others: what a file system allows may differ from node to node.
    """
    beside = Path(folder) / PACKINGS
    probe = beside / f"{socket.gethostname()}.{os.getpid()}.probe"
    try:
        beside.mkdir(exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return Path(cache) / PACKINGS
    return beside


def make_ready(
    packings: Sequence[PackingFiles],
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Make what is missing of a share of packings; when all shares are made, one process seals them.

    Args:
        share: (k, n): the k-th (from 0) of n shares.
        progress: told files done, of how many to make.
    Raises: DataError: a shard is damaged, or the place cannot be written.
    """
    work = [(packing, number) for packing in packings for number in range(packing.files)][share[0] :: share[1]]
    with ThreadPoolExecutor(_THREADS) as pool:
        made = list(pool.map(lambda each: each[0].is_made(each[1]), work))
    todo = [each for each, there in zip(work, made) if not there]
    for done, (packing, number) in enumerate(todo):
        progress(done, len(todo))
        packing.make(number)
    progress(len(todo), len(todo))


def seal(packings: Iterable[PackingFiles]) -> None:
    """Say of packings whose files are all there that they are ready. Raises DataError: some are missing."""
    for packing in packings:
        packing.seal()


class OpenPacking:
    """A packing that is ready: counts in memory, 16 bytes a shard; what sequences are made of is read when asked for.

    ``sequences``: [shards + 1] int64, sequences before each shard.
    """

    def __init__(self, files: PackingFiles, opened: OpenFiles):
        """Raises DataError: the packing is not there, or is damaged."""
        self.files, self._opened = files, opened
        try:
            # Not mapped: a mapping keeps a descriptor, and there may be hundreds of sources.
            index = np.load(files.index)
        except FileNotFoundError:
            raise DataError(
                f"packing {files.index} is missing on {socket.gethostname()}: where {files.folder} cannot be written, "
                "data.cache must be a folder that all nodes share"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"packing {files.index} cannot be read ({error}); remove it to have it rebuilt") from None
        if index.dtype != _INDEX or len(index) != len(files.shards) + 1:
            raise DataError(f"packing {files.index} is not of these shards; remove it to have it rebuilt")
        self.sequences = index["sequences"].astype(np.int64)
        self._places = index["place"].astype(np.int64)
        self._first, self._shards_a_file = files.shards.start, files.shards_a_file

    def find(self, sequence: int) -> tuple[int, np.ndarray]:
        """Return (shard in the table, its pieces [pieces] of PIECE) of a sequence.

        Raises: DataError: its file is missing or torn.
        """
        shard = int(np.searchsorted(self.sequences, sequence, side="right")) - 1
        within = sequence - int(self.sequences[shard])
        count = int(self.sequences[shard + 1] - self.sequences[shard])
        path = str(self.files.file(shard // self._shards_a_file))
        place = int(self._places[shard])
        start, stop = np.frombuffer(self._read(path, 2 * _START.itemsize, place + within * _START.itemsize), _START)
        place += (count + 1) * _START.itemsize + int(start) * PIECE.itemsize
        pieces = np.frombuffer(self._read(path, (int(stop) - int(start)) * PIECE.itemsize, place), PIECE)
        return self._first + shard, pieces

    def _read(self, path: str, size: int, place: int) -> bytes:
        try:
            found = self._opened.read(path, size, place)
        except OSError as error:
            raise DataError(f"packing {path} cannot be read ({error.strerror}); remove it to have it rebuilt") from None
        if len(found) != size:
            raise DataError(f"packing {path} ends early; remove it to have it rebuilt")
        return found
