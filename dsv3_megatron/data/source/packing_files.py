"""Packings on disk: made once with the shards, or by the ranks of a run, each a share; read at places, never mapped.

A packing is a function of the shards, the sequence length and fill-in-the-middle, not of a run's seed:

    packing/KEY/SOURCE/SPLIT_00000.pack     the packings of some shards in a row, at most ``FILES`` files of all shards
    packing/KEY/SOURCE/SPLIT.index          [shards + 1]: sequences before each, and where its packing begins

They lie beside the shards, or in data.cache where that folder cannot be written. A file appears under its name as a
whole. Whoever makes one that another has made meanwhile replaces it by the same bytes, so no lock is needed on any file
system. SPLIT.index comes last, when all files are there: a packing is ready when that is there.

A .pack file is ``_HEAD``, (pieces, sequences) uint64 of each shard, for each shard its ``starts`` and ``pieces``, and
at the end the checksums of the blocks of all that. The ranks of a run compare each a share of the files when they
start, and make those again that are damaged; a block is compared again whenever a part of it is read.
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
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from dsv3_megatron.data.checked.blocks import (
    BLOCK_BYTES,
    BlockSums,
    DamagedError,
    parse_sums,
    read_checked,
    sums_bytes,
    verify,
)
from dsv3_megatron.data.source.fim import MARKS
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing import PIECE, PackingRule, pack
from dsv3_megatron.data.source.shard_table import ShardTable
from dsv3_megatron.data.source.shards import Split, read_lengths
from dsv3_megatron.run.handed import open_regular, read_bytes
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

VERSION = 3  # of what a packing holds: another one has another folder
FILES = 4096  # at most, and one more for each source and split: few inodes, and enough work for many ranks
PACKINGS = "packing"
_HEAD = struct.Struct("<8sII")  # magic, version, shards
_MAGIC = b"dsv3pack"
_COUNTS = np.dtype([("pieces", "<u8"), ("sequences", "<u8")])
_INDEX_HEAD = struct.Struct("<8sIIQ")  # magic, version, shards, XXH3 of what follows
_INDEX_MAGIC = b"dsv3pidx"
_INDEX = np.dtype([("sequences", "<u8"), ("place", "<u8")])  # before a shard; of its packing in its file, in bytes
_START = np.dtype("<u4")
_MOST_BYTES = 1 << 36  # of a .pack file, so that what a damaged one says of itself asks for no more memory than this
_KEPT = 8  # files of a packing whose checksums stay in memory
_REBUILT = "remove it to have it rebuilt"
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
        return self._base / f"{self.split}.index"

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
        """Return whether a .pack file is there, and whole: all of it is read."""
        return self._read_counts(number, all_of_it=True) is not None

    def make(self, number: int) -> None:
        """Write a .pack file, unless it is there. Raises DataError: a shard is damaged, or the place has no room."""
        if self.is_made(number):
            return
        rule = self.rule.of(self.split)
        packings = [pack(self.lengths(shard), rule, self.table.bin_sha256(shard)) for shard in self.shards_of(number)]
        counts = [(len(p.pieces), len(p.starts) - 1) for p in packings]
        sums = BlockSums()
        with _replacing(self.file(number)) as file:

            def write(data: bytes) -> None:
                file.write(data)
                sums.add(data)

            write(_HEAD.pack(_MAGIC, VERSION, len(packings)))
            write(np.asarray(counts, dtype=_COUNTS).tobytes())
            for packing in packings:
                write(packing.starts.astype(_START).tobytes())
                write(packing.pieces.tobytes())
            file.write(sums.content())

    def lengths(self, shard: int) -> np.ndarray:
        """Return the lengths [documents] int64 of a shard's documents, read from its .idx.

        Raises: DataError: the file is not what the table says.
        """
        row = self.table.row(shard)
        return read_lengths(self.folder, row, self.vocab_size, row.idx_sha256)

    def missing(self) -> list[Path]:
        """Return the .pack files that are not there, or not whole."""
        with ThreadPoolExecutor(_THREADS) as pool:
            made = list(pool.map(self.is_made, range(self.files)))
        return [self.file(number) for number, there in enumerate(made) if not there]

    def seal(self) -> bool:
        """Write the index, once all files are there; return whether a damaged one has been replaced.

        Raises DataError: some files are not there.
        """
        was_there = self.index.exists()
        if was_there:
            with suppress(ValueError, OSError):
                self.read_index()
                return False
        with ThreadPoolExecutor(_THREADS) as pool:
            counts = list(pool.map(self._read_counts, range(self.files)))
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
            sizes = _sizes(found)
            here = slice(at, at + len(found))
            index["place"][here] = _body(len(found)) + np.cumsum(sizes) - sizes
            index["sequences"][at + 1 : at + 1 + len(found)] = found["sequences"]
            at += len(found)
        index["sequences"] = np.cumsum(index["sequences"])
        data = index.tobytes()
        with _replacing(self.index) as file:
            file.write(_INDEX_HEAD.pack(_INDEX_MAGIC, VERSION, len(index), xxhash.xxh3_64_intdigest(data)) + data)
        self.tidy()
        return was_there

    def read_index(self) -> np.ndarray:
        """Return the index [shards + 1]. Raises OSError: it cannot be read. ValueError: it is damaged."""
        rows = len(self.shards) + 1
        size = _INDEX_HEAD.size + rows * _INDEX.itemsize
        content = read_bytes(self.index, size)
        data = content[_INDEX_HEAD.size :]
        head = _INDEX_HEAD.pack(_INDEX_MAGIC, VERSION, rows, xxhash.xxh3_64_intdigest(data))
        if len(content) != size or content[: _INDEX_HEAD.size] != head:
            raise ValueError("it is damaged")
        return np.frombuffer(data, _INDEX)

    def tidy(self) -> None:
        """Remove what makers that were killed have left, of a packing that is ready: nobody needs it any more."""
        for left in self._base.glob(f"{self.split}*.partial"):
            with suppress(OSError):  # a folder that cannot be written is read all the same
                left.unlink(missing_ok=True)

    def _read_counts(self, number: int, *, all_of_it: bool = False) -> np.ndarray | None:
        """Return (pieces, sequences) of the shards of a .pack file; None where it is not there, torn or damaged.

        ``all_of_it``: compare all of the file.
        """
        shards = len(self.shards_of(number))
        try:
            with open_regular(self.file(number)) as file:
                head = file.read(_body(shards))
                size = os.fstat(file.fileno()).st_size
                if len(head) != _body(shards) or head[: _HEAD.size] != _HEAD.pack(_MAGIC, VERSION, shards):
                    return None
                counts = np.frombuffer(head, _COUNTS, shards, _HEAD.size)
                if any(int(counts[name].max(initial=0)) > size for name in ("pieces", "sequences")):
                    return None  # in front of a sum that might wrap
                end = _body(shards) + int(_sizes(counts).sum())
                if size != end + sums_bytes(end):
                    return None
                file.seek(end)
                sums = parse_sums(file.read(), end)
                file.seek(0)
                verify(file, sums, end if all_of_it else min(end, -(-len(head) // BLOCK_BYTES) * BLOCK_BYTES))
        except (OSError, DamagedError):
            return None
        return counts


def _sizes(counts: np.ndarray) -> np.ndarray:
    """Return how many bytes the packing of each shard takes, of its ``counts``."""
    sizes: np.ndarray = (counts["sequences"] + 1) * _START.itemsize + counts["pieces"] * PIECE.itemsize
    return sizes


def _body(shards: int) -> int:
    """Return where the packings begin in a .pack file, in bytes."""
    return _HEAD.size + shards * _COUNTS.itemsize


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, which then takes the place of ``path``. Raises DataError: it cannot be written."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.partial")
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new_file(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except FileNotFoundError:
            if not path.exists():  # else another maker was first, found all there, and has tidied up
                raise
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        what = f"packing {path} is damaged, and cannot be made again there" if there else (
            f"packing {path} cannot be written"
        )  # fmt: skip
        raise DataError(f"{what} ({error.strerror}); make room, or name another data.cache") from None


def choose_place(folder: str | Path, cache: str | Path) -> Path:
    """Return where packings of a folder are kept: beside the shards, or in the cache where that cannot be written.

    Ask one process and tell the others: what a file system allows may differ from node to node.
    """
    beside = Path(folder) / PACKINGS
    probe = beside / f"{socket.gethostname()}.{os.getpid()}.probe"
    try:
        beside.mkdir(exist_ok=True)
        new_file(probe).close()
        probe.unlink()
    except OSError:
        return Path(cache) / PACKINGS
    return beside


def make_ready(
    packings: Sequence[PackingFiles],
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Make what is missing or damaged of a share of packings; when all shares are made, one process seals them.

    Args:
        share: (k, n): the k-th (from 0) of n shares.
        progress: told files done, of how many to make.
        tell: gets a line for each file that is damaged.
    Raises: DataError: a shard is damaged, or the place cannot be written.
    """
    work = [(packing, number) for packing in packings for number in range(packing.files)][share[0] :: share[1]]
    with ThreadPoolExecutor(_THREADS) as pool:
        made = list(pool.map(lambda each: each[0].is_made(each[1]), work))
    todo = [each for each, there in zip(work, made) if not there]
    for done, (packing, number) in enumerate(todo):
        progress(done, len(todo))
        if packing.file(number).exists():
            tell(f"packing {packing.file(number)} is damaged; it is made again")
        packing.make(number)
    progress(len(todo), len(todo))


def seal(packings: Iterable[PackingFiles], tell: Callable[[str], None] = lambda _: None) -> None:
    """Say of packings whose files are all there that they are ready. Raises DataError: some are missing.

    ``tell``: gets a line for each index that is damaged.
    """
    for packing in packings:
        if packing.seal():
            tell(f"packing {packing.index} was damaged; it was made again")


class OpenPacking:
    """A packing that is ready: counts in memory, 16 bytes a shard; what sequences are made of is read when asked for.

    ``sequences``: [shards + 1] int64, sequences before each shard.
    """

    def __init__(self, files: PackingFiles, opened: OpenFiles):
        """Raises DataError: the packing is not there, or is damaged."""
        self.files, self._opened = files, opened
        try:
            # Not mapped: a mapping keeps a descriptor, and there may be hundreds of sources.
            index = files.read_index()
        except FileNotFoundError:
            raise DataError(
                f"packing {files.index} is missing on {socket.gethostname()}: where {files.folder} cannot be written, "
                "data.cache must be a folder that all nodes share"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"packing {files.index} cannot be read ({why_unread(error)}); {_REBUILT}") from None
        self._sums = lru_cache(_KEPT)(self._read_sums)
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
        number, place = shard // self._shards_a_file, int(self._places[shard])
        start, stop = np.frombuffer(self._read(number, 2 * _START.itemsize, place + within * _START.itemsize), _START)
        most = self.files.rule.sequence_length
        if not 0 <= int(stop) - int(start) <= most:
            raise self._foreign(number)
        place += (count + 1) * _START.itemsize + int(start) * PIECE.itemsize
        pieces = np.frombuffer(self._read(number, (int(stop) - int(start)) * PIECE.itemsize, place), PIECE)
        if not self._can_be(pieces, self._first + shard, most):
            raise self._foreign(number)
        return self._first + shard, pieces

    def _can_be(self, pieces: np.ndarray, shard: int, most: int) -> bool:
        """Return whether pieces are of documents that the shard can have, and fit into a sequence of ``most`` tokens:
        somebody may have made the file whose checksums agree and whose content does not."""
        row = self.files.table.rows[shard]
        whole = {name: pieces[name].astype(np.int64) for name in PIECE.names or ()}
        stream = whole["document_length"] + MARKS * (whole["rearranged"] != 0)
        return bool(
            (whole["length"] >= 1).all()
            and int(whole["length"].sum()) <= most
            and (whole["document"] < int(row["documents"])).all()
            and (whole["offset"] + whole["length"] <= stream).all()
            and (whole["position"] >= 0).all()
            and (whole["position"] + whole["document_length"] <= int(row["tokens"])).all()
        )

    def _foreign(self, number: int) -> DataError:
        return DataError(f"packing {self.files.file(number)} is not of these shards; {_REBUILT}")

    def _read(self, number: int, size: int, place: int) -> bytes:
        path = str(self.files.file(number))
        try:
            sums, end = self._sums(number)
            found = read_checked(self._opened, path, size, place, sums, end)
        except OSError as error:
            raise DataError(f"packing {path} cannot be read ({error.strerror}); {_REBUILT}") from None
        except DamagedError as error:
            raise DataError(f"packing {path} is damaged: {error}; start again, and it is made again") from None
        if len(found) != size:
            raise DataError(f"packing {path} ends early; {_REBUILT}")
        return found

    def _read_sums(self, number: int) -> tuple[np.ndarray, int]:
        """Return the checksums of the blocks of a .pack file, and how many of its bytes they are of."""
        shards = len(self.files.shards_of(number))
        path, first = str(self.files.file(number)), number * self._shards_a_file
        head = self._opened.read(path, _body(shards), 0)
        if len(head) < _body(shards):
            raise DamagedError(f"it ends at byte {len(head):,}")
        counts = np.frombuffer(head, _COUNTS, shards, _HEAD.size)
        sequences = np.diff(self.sequences[first : first + shards + 1])
        if (counts["sequences"].astype(np.int64) != sequences).any():
            raise DamagedError("it is not what the index says")
        if int(counts["pieces"].max(initial=0)) > 1 << 40:
            raise DamagedError("it is not of these shards")
        end = _body(shards) + int(_sizes(counts).sum())
        return parse_sums(self._opened.read(path, sums_bytes(min(end, _MOST_BYTES)) + 1, end), end), end
