"""Which documents are copies of an earlier one, on disk: memory stays within a limit at any number of documents.

Hashes of texts are dealt into files by their first bits, so that copies meet in one file; each file fits into memory
and is sorted there. The first in the order of the input stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from dsv3_megatron.data.prepare.encode import read_hashes
from dsv3_megatron.run.made import appended_file, new_file

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
_BYTES_EACH = 96  # of memory, for a record while its file is sorted


def mark_duplicates(files: Sequence[Path], counts: Sequence[int], memory: int, folder: Path, result: Path) -> None:
    """Write which documents are copies of an earlier one: ``result`` becomes a .npy of bool [documents].

    Args:
        files: of hashes (``encode.HASH``), in the order of the input.
        counts: documents of each.
        memory: bytes that may be used.
        folder: for files that are removed again, 24 bytes a document.
    """
    total = sum(counts)
    buckets = max(1, -(-total * _BYTES_EACH // memory))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}" for number in range(buckets)]
    for path in paths:
        path.unlink(missing_ok=True)  # of a run that was killed here
    _deal(files, counts, memory, paths)
    partial = result.with_name(f"{result.name}.partial")
    new_file(partial).close()
    marked = np.lib.format.open_memmap(partial, mode="w+", dtype=bool, shape=(total,))
    for path in paths:
        if path.exists():
            copies = _copies(np.fromfile(path, dtype=_RECORD))
            marked[copies] = True
            path.unlink()
    marked.flush()
    del marked
    partial.rename(result)


def _deal(files: Sequence[Path], counts: Sequence[int], memory: int, paths: list[Path]) -> None:
    """Append each document's record to the file that its hash names."""
    at, held, size = 0, [], 0
    for file, count in zip(files, counts):
        hashes = read_hashes(file, count)
        records = np.empty(len(hashes), dtype=_RECORD)
        records["high"], records["low"] = hashes["high"], hashes["low"]
        records["number"] = np.arange(at, at + len(hashes))
        at += len(hashes)
        held.append(records)
        size += len(hashes) * _BYTES_EACH
        if size >= memory:
            _append(np.concatenate(held), paths)
            held, size = [], 0
    if held:
        _append(np.concatenate(held), paths)


def _append(records: np.ndarray, paths: list[Path]) -> None:
    bucket = (records["high"] >> np.uint64(32)) * np.uint64(len(paths)) >> np.uint64(32)
    order = np.argsort(bucket, kind="stable")
    records, bucket = records[order], bucket[order]
    edges = np.flatnonzero(np.diff(bucket, prepend=np.uint64(len(paths)), append=np.uint64(len(paths))))
    for start, stop in pairwise(edges):
        # opened when needed: there may be more of them than a process may open
        with appended_file(paths[int(bucket[start])]) as file:
            records[start:stop].tofile(file)


def _copies(records: np.ndarray) -> np.ndarray:
    """Return the numbers of the documents that are copies of one with a lower number, in ascending order."""
    order = np.lexsort((records["number"], records["low"], records["high"]))
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for name in ("high", "low"):
        values = records[name][order]
        same &= values[1:] == values[:-1]
    return np.sort(records["number"][order[1:][same]])
