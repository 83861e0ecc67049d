"""The table of a folder's shards: a row each, memory-mapped, so that opening a folder costs the same at any size.

Rows are sorted by source, split, part and number. The shards of a source's split are therefore one range, which the
totals of the manifest tell. The table is written first and the manifest last, with the table's checksum in it: the
folder is complete when the manifest is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.blocks import sums_bytes
from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.source.shards import (
    SPLITS,
    Manifest,
    Shard,
    Source,
    Split,
    Totals,
    file_sha256,
    index_bytes,
    token_dtype,
)
from dsv3_megatron.run.handed import NOT_REGULAR, regular_size
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

TABLE = "shards.npy"
ROW = np.dtype(
    [
        ("source", "<u4"),  # its number in the manifest
        ("split", "u1"),  # its number in SPLITS
        ("part", "<u2"),  # of a preparation in parts, from 1; 0 = made in one
        ("number", "<u4"),  # in its part
        ("documents", "<u8"),
        ("tokens", "<u8"),
        ("bin_bytes", "<u8"),
        ("idx_bytes", "<u8"),
        ("bin_sha256", "V32"),
        ("idx_sha256", "V32"),
        ("origin_sha256", "V32"),  # zeros = it is not known where its documents come from
        ("first_file", "<u4"),  # origin of its first document
        ("first_row", "<u8"),
    ]
)
_NAME = re.compile(rf"(.+)/({'|'.join(SPLITS)})(?:_p([0-9]{{1,5}}))?_([0-9]{{1,9}})")
_THREADS = 32  # a network file system answers many at once, each after milliseconds
_RUN = 64  # shards that a thread looks at in a row: a task for each would cost more memory than the table
_NOTHING = bytes(32)


@dataclass(frozen=True)
class ShardRow:
    """A row of the table, as Python's values. ``origin_sha256`` is None where origins are not known."""

    name: str
    source: int
    split: Split
    part: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: bytes
    idx_sha256: bytes
    origin_sha256: bytes | None
    first_file: int
    first_row: int


class ShardTable:
    """The shards of a folder, by their numbers in it.

    Args:
        sources: of the manifest: names, and totals that tell ranges.
        rows: [shards] of ``ROW``.
        has_sums: whether the checksums of the blocks of every .bin are there.
    """

    def __init__(self, sources: Sequence[Source], rows: np.ndarray, has_sums: bool = False):
        self.names = [source.name for source in sources]
        self.rows, self.has_sums = rows, has_sums
        counts = [source.shards[split].shards for source in sources for split in SPLITS]
        self._starts = list(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ShardRow]:
        return map(self.row, range(len(self)))

    def row(self, number: int) -> ShardRow:
        """Return what the table says of a shard."""
        row = self.rows[number]
        origin = row["origin_sha256"].tobytes()
        return ShardRow(
            name=self.name(number),
            split=SPLITS[row["split"]],
            bin_sha256=self.bin_sha256(number),
            idx_sha256=row["idx_sha256"].tobytes(),
            origin_sha256=None if origin == _NOTHING else origin,
            **{
                key: int(row[key])
                for key in (
                    "source",
                    "part",
                    "documents",
                    "tokens",
                    "bin_bytes",
                    "idx_bytes",
                    "first_file",
                    "first_row",
                )
            },
        )

    def name(self, number: int) -> str:
        """Return the path of a shard's files in the folder, without suffix."""
        row = self.rows[number]
        part = f"p{row['part']:03d}_" if row["part"] else ""
        return f"{self.names[row['source']]}/{SPLITS[row['split']]}_{part}{row['number']:05d}"

    def bin_sha256(self, number: int) -> bytes:
        """Return the SHA-256 of a shard's tokens: what tells it from every other, wherever it lies."""
        return bytes(self.rows["bin_sha256"][number].tobytes())

    def range_of(self, source: int, split: Split) -> range:
        """Return the numbers of the shards of a source (its number in the manifest) and split."""
        place = len(SPLITS) * source + SPLITS.index(split)
        return range(self._starts[place], self._starts[place + 1])


def open_table(folder: str | Path, manifest: Manifest) -> ShardTable:
    """Return the table of a folder, memory-mapped; that of a version 1 manifest is made of its list.

    Raises: DataError: the table is missing, damaged, of another time than the manifest, or says what cannot be.
    """
    path = Path(folder) / TABLE
    if manifest._listed is not None:
        rows = _rows(manifest.sources, manifest._listed)
    else:
        shards = sum(source.shards[split].shards for source in manifest.sources for split in SPLITS)
        try:
            rows = open_npy(path, ROW, shards, mapped=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({why_unread(error)}), the manifest says {shards} shards; restore both or "
                "prepare the folder again"
            ) from None
    if fault := _fault_of(rows, manifest):
        raise DataError(f"{path}, {fault}; restore it or prepare the folder again")
    return ShardTable(manifest.sources, rows, manifest.has_sums)


def _fault_of(rows: np.ndarray, manifest: Manifest) -> str | None:
    """Return what cannot be in a table, whoever wrote it; None: all can. Looks at all rows at once."""
    names = ("source", "split", "part", "number")
    order = [rows[name].astype(np.int64) for name in names]
    sources, splits = order[:2]
    if len(rows) and (int(sources.max()) >= len(manifest.sources) or int(splits.max()) >= len(SPLITS)):
        return f"has a shard of source {sources.max()}, split {splits.max()}, which the manifest does not have"
    ascends = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    for values in reversed(order):
        ascends = (values[1:] > values[:-1]) | ((values[1:] == values[:-1]) & ascends)
    if not ascends.all():
        return f"row {int(np.argmin(ascends)) + 1} is not in order, or is there twice"
    itemsize, tokens = token_dtype(manifest.vocab_size).itemsize, rows["tokens"]
    most = np.uint64(1 << 40)  # of documents or tokens of a shard: sums of more might wrap
    wrong = (tokens > most) | (rows["documents"] > tokens) | (rows["bin_bytes"] != tokens * np.uint64(itemsize))
    wrong |= rows["idx_bytes"] != index_bytes(0) + rows["documents"] * np.uint64(index_bytes(1) - index_bytes(0))
    if wrong.any():
        row = rows[int(np.argmax(wrong))]
        return (
            f"row {int(np.argmax(wrong))} says {row['documents']} documents of {row['tokens']} tokens of {itemsize} "
            f"bytes in files of {row['bin_bytes']} and {row['idx_bytes']} bytes, which does not agree"
        )
    place = sources * len(SPLITS) + splits
    for name, counted in (("shards", None), ("documents", rows["documents"]), ("tokens", tokens)):
        found = np.bincount(place, counted, minlength=len(SPLITS) * len(manifest.sources))
        said = [getattr(source.shards[split], name) for source in manifest.sources for split in SPLITS]
        if differ := [n for n, (one, other) in enumerate(zip(found.tolist(), said)) if int(one) != other]:
            source = manifest.sources[differ[0] // len(SPLITS)]
            where = f"{source.name}, {SPLITS[differ[0] % len(SPLITS)]}"
            return f"has {int(found[differ[0]])} {name} of source {where}; the manifest says {said[differ[0]]}"
    return None


def write_table(folder: str | Path, sources: Sequence[Source], shards: Iterable[Shard]) -> tuple[list[Source], str]:
    """Write the table of shards, which may come in any order.

    Returns: (the sources with the totals of their shards, SHA-256 of the table): what the manifest is written with,
    after this.
    """
    rows = _rows(sources, shards)
    path = Path(folder) / TABLE
    temporary = path.with_name(f"{TABLE}.partial")  # the same after a kill, so that none is left
    with new_file(temporary) as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    digest = file_sha256(temporary)
    os.replace(temporary, path)
    return [source.model_copy(update={"shards": _totals(rows, n)}) for n, source in enumerate(sources)], digest


def _totals(rows: np.ndarray, source: int) -> dict[Split, Totals]:
    found: dict[Split, Totals] = {}
    for number, split in enumerate(SPLITS):
        mine = rows[(rows["source"] == source) & (rows["split"] == number)]
        found[split] = Totals(
            shards=len(mine), documents=int(mine["documents"].sum()), tokens=int(mine["tokens"].sum())
        )
    return found


def _rows(sources: Sequence[Source], shards: Iterable[Shard]) -> np.ndarray:
    """Return the rows of shards, sorted. Raises: DataError: a name is not one that prepare_data gives."""
    numbers = {source.name: number for number, source in enumerate(sources)}
    found = []
    for shard in shards:
        named = _NAME.fullmatch(shard.name)
        if named is None or named[1] not in numbers or int(named[3] or 0) >= 1 << 16:
            raise DataError(
                f"shard {shard.name} is of none of the sources {', '.join(numbers)}, or is not named as prepare_data "
                "names shards; prepare the folder again"
            )
        found.append(
            (
                numbers[named[1]],
                SPLITS.index(named[2]),  # type: ignore[arg-type]
                int(named[3] or 0),
                int(named[4]),
                shard.documents,
                shard.tokens,
                shard.bytes["bin"],
                shard.bytes["idx"],
                *(np.void(bytes.fromhex(shard.sha256[suffix])) for suffix in ("bin", "idx")),  # type: ignore[index]
                np.void(_NOTHING if shard.origin_sha256 is None else bytes.fromhex(shard.origin_sha256)),
                shard.first_file,
                shard.first_row,
            )
        )
    return np.asarray(sorted(found, key=lambda row: row[:4]), dtype=ROW)


def check_files(folder: str | Path, table: ShardTable, share: tuple[int, int] = (0, 1)) -> None:
    """See that the files of shards that a run reads are there, in the folder, with the sizes that they were written in.

    Args:
        share: (k, n): look at the k-th (from 0) of n equal runs of shards, so that n ranks look at each file once.
    Raises: DataError: naming the first that is missing, cut, or not a file of the folder.
    """
    rank, ranks = share
    mine = range(len(table) * rank // ranks, len(table) * (rank + 1) // ranks)
    runs = [mine[at : at + _RUN] for at in range(0, len(mine), _RUN)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for fault in pool.map(lambda run: _first_fault(folder, table, run), runs):
            if fault is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(f"{fault}; restore it or prepare the folder again")


def _first_fault(folder: str | Path, table: ShardTable, run: range) -> str | None:
    """Return what is wrong with the first file of some shards that is not as it was written; None: all are."""
    sizes = {suffix: table.rows[f"{suffix}_bytes"][run.start : run.stop].tolist() for suffix in ("bin", "idx")}
    if table.has_sums:
        sizes["sums"] = list(map(sums_bytes, sizes["bin"]))
    for at, number in enumerate(run):
        name = table.name(number)
        for suffix, expected in sizes.items():
            if fault := fault_of_file(folder, f"{name}.{suffix}", expected[at]):
                return fault
    return None


def fault_of_file(folder: str | Path, name: str, size: int | None = None) -> str | None:
    """Return what is wrong with a file of a shard by what the system says of it; None: nothing.

    The folder of a source may be a link to another disk: what is looked for there are shards. But a link from the name
    of a shard to a file elsewhere would have its bytes trained on, whatever they are.

    Args:
        size: that it was written with; None = it is not compared.
    """
    file = f"{folder}/{name}"
    try:
        found = regular_size(folder, name)
    except ValueError as error:
        return f"{file} is refused: {error}"
    except OSError as error:
        is_other = error.errno == NOT_REGULAR
        return f"{file} is not a regular file" if is_other else f"{file} cannot be read ({error.strerror})"
    if size is not None and found != size:
        return f"{file} has {found} bytes, the manifest says {size} bytes"
    return None


def check_table(folder: str | Path, manifest: Manifest) -> None:
    """Read the table and compare its SHA-256. Raises: DataError: it is of another time than the manifest."""
    if manifest._listed is not None:
        return
    try:
        found = file_sha256(Path(folder) / TABLE)
    except OSError as error:
        raise DataError(f"{Path(folder) / TABLE} cannot be read ({error.strerror}); restore it") from None
    if found != manifest.table_sha256:
        raise DataError(
            f"{Path(folder) / TABLE} has sha256 {found[:12]}.., the manifest says {manifest.table_sha256[:12]}..; "
            "restore both or prepare the folder again"
        )
