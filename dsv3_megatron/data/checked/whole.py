"""Folders of shards compared with their table, every byte, and given the checksums of blocks where they have none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsv3_megatron.data.checked.blocks import BlockSums, sums_bytes
from dsv3_megatron.data.source.shard_table import ShardRow, ShardTable, check_files, check_table, open_table
from dsv3_megatron.data.source.shards import MANIFEST, Manifest, file_sha256, read_manifest
from dsv3_megatron.run.files import write_json
from dsv3_megatron.run.handed import open_regular, parse_json, read_bytes, read_text
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.processes import in_processes
from parallel.errors import DataError

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Checked:
    """What was compared.

    Attributes:
        bytes: of the tokens of ``shards``.
        added: of so many shards the checksums of blocks were written.
        lacking: shards of the folder that have none yet: those of other parts.
    """

    shards: int
    bytes: int
    added: int
    lacking: int


def check_folder(folder: str | Path, workers: int, part: tuple[int, int] = (1, 1)) -> Checked:
    """Read the files of a folder's shards, compare their SHA-256 with the table, and write what checksums of blocks
    are missing. A folder that has them all is only read.

    Args:
        part: its number from 1, and how many there are: several nodes check one each.
    Raises: DataError: naming the first file that is not what the table says, or a folder that cannot be written.
    """
    manifest = read_manifest(folder)
    check_table(folder, manifest)
    table = open_table(folder, manifest)
    check_files(folder, ShardTable(manifest.sources, table.rows), share := (part[0] - 1, part[1]))
    mine = range(len(table) * share[0] // share[1], len(table) * (share[0] + 1) // share[1])
    rows = [table.row(number) for number in mine]
    added = sum(in_processes(partial(_check, folder), rows, workers))
    lacking = sum(not _has_sums(folder, row) for row in table) if added or not manifest.has_sums else 0
    if not lacking and not manifest.has_sums:
        _say_so(Path(folder) / MANIFEST)
    return Checked(len(rows), sum(row.bin_bytes for row in rows), added, lacking)


def verify_checksums(folder: str | Path, manifest: Manifest) -> None:
    """Compare the table and all files of the shards with their SHA-256, and change nothing.

    Raises: DataError: naming the first that differs.
    """
    check_table(folder, manifest)
    for row in open_table(folder, manifest):
        sums = _compared(folder, row)
        if manifest.has_sums and _stored_sums(folder, row) != sums:
            raise DataError(f"{folder}/{row.name}.sums is not of the shard; remove it, and check the folder")


def _check(folder: str | Path, row: ShardRow) -> bool:
    """Compare a shard; return whether its checksums of blocks were written."""
    sums = _compared(folder, row)
    if _stored_sums(folder, row) == sums:
        return False
    path = Path(folder) / f"{row.name}.sums"
    try:
        partial_path = path.with_name(f"{path.name}.partial")
        with new_file(partial_path) as file:
            file.write(sums)
        partial_path.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); the shard is whole, and without that file damage to it will "
            "not be noticed: make the folder writable"
        ) from None
    return True


def _compared(folder: str | Path, row: ShardRow) -> bytes:
    """Return the checksums of the blocks of a shard. Raises: DataError: a file is not what the table says."""
    expected = {"idx": row.idx_sha256, "origin.npy": row.origin_sha256}
    try:
        for suffix, digest in expected.items():
            path = Path(folder) / f"{row.name}.{suffix}"
            if digest is not None and (found := file_sha256(path)) != digest.hex():
                raise _differs(path, found, digest)
        path = Path(folder) / f"{row.name}.bin"
        whole, sums = hashlib.sha256(), BlockSums()
        with open_regular(path) as file:
            while data := file.read(_READ_BYTES):
                whole.update(data)
                sums.add(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it") from None
    if whole.digest() != row.bin_sha256:
        raise _differs(path, whole.hexdigest(), row.bin_sha256)
    return sums.content()


def _differs(path: Path, found: str, digest: bytes) -> DataError:
    return DataError(
        f"{path} has sha256 {found[:12]}.., the table says {digest.hex()[:12]}..; restore it, or prepare the folder "
        "again"
    )


def _stored_sums(folder: str | Path, row: ShardRow) -> bytes | None:
    try:
        return read_bytes(Path(folder) / f"{row.name}.sums", sums_bytes(row.bin_bytes))
    except (OSError, ValueError):
        return None


def _has_sums(folder: str | Path, row: ShardRow) -> bool:
    path = Path(folder) / f"{row.name}.sums"
    return path.is_file() and path.stat().st_size == sums_bytes(row.bin_bytes)


def _say_so(manifest: Path) -> None:
    """Write into a manifest, which stays what it is otherwise, that there are checksums of all blocks."""
    try:
        write_json(manifest, {**parse_json(read_text(manifest)), "has_sums": True})
    except OSError as error:
        raise DataError(f"{manifest} cannot be written ({error.strerror}); make the folder writable") from None
