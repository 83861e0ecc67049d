"""The tokens of shards at any place, each block compared with its checksum whenever it is read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.blocks import DamagedError, parse_sums, read_checked, sums_bytes
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.shard_table import ShardTable, fault_of_file
from dsv3_megatron.data.source.shards import token_dtype
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_KEPT = 64  # shards whose checksums stay in memory: 8 bytes for 64 KiB of tokens


class CheckedShards:
    """What a folder's shards hold, read from any number of threads."""

    def __init__(
        self, folder: str | Path, table: ShardTable, vocab_size: int, files: OpenFiles, ids: int | None = None
    ):
        """Read a folder that was prepared for ``vocab_size`` ids.

        Args:
            files: what opens them.
            ids: that the tokenizer has, where they may be fewer.
        """
        self._folder, self._table, self._files = folder, table, files
        self._ids = vocab_size if ids is None else min(vocab_size, ids)
        self._dtype = token_dtype(vocab_size)
        self._sums = lru_cache(_KEPT)(self._read_sums)

    def tokens(self, shard: int, place: int, size: int, document: int) -> np.ndarray:
        """Return ``size`` tokens from ``place`` on of a shard, by its number in the table.

        Args:
            document: of which they are, for messages.
        Raises: DataError: the file is missing, cut or damaged, or leads elsewhere.
        """
        end, itemsize = int(self._table.rows["bin_bytes"][shard]), self._dtype.itemsize
        size_bytes = min(size * itemsize, end)  # a packing that claims more is found out below
        sums, path = self._sums(shard), f"{self._folder}/{self._table.name(shard)}.bin"
        try:
            if sums is None:
                data = self._files.read(path, size_bytes, place * itemsize)
            else:
                data = read_checked(self._files, path, size_bytes, place * itemsize, sums, end)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); restore it") from None
        except DamagedError as error:
            raise DataError(f"{path} is damaged: {error}; restore it or prepare the folder again") from None
        tokens = np.frombuffer(data[: len(data) // itemsize * itemsize], self._dtype)
        if len(tokens) != size:
            raise DataError(f"{path} ends within document {document}; restore it or prepare the folder again")
        unsigned = tokens.view(f"<u{itemsize}")  # in which a negative id is a large one
        if len(tokens) and int(unsigned.max()) >= self._ids:
            raise DataError(
                f"{path} has token {tokens[unsigned.argmax()]} in document {document}, none of the tokenizer's "
                f"{self._ids} ids; restore it or prepare the folder again"
            )
        return tokens

    def _read_sums(self, shard: int) -> np.ndarray | None:
        """Return the checksums of a shard's blocks; None where the folder has none."""
        size, name = int(self._table.rows["bin_bytes"][shard]), self._table.name(shard)
        if fault := fault_of_file(self._folder, f"{name}.bin", size):  # before memory is asked for
            raise DataError(f"{fault}; restore it or prepare the folder again")
        if not self._table.has_sums:
            return None
        path = f"{self._folder}/{name}.sums"
        try:
            return parse_sums(self._files.read(path, sums_bytes(size) + 1, 0), size)
        except (OSError, DamagedError) as error:
            raise DataError(
                f"{path} cannot be read ({why_unread(error)}); remove it, and launcher/data.py check "
                f"data={self._folder} writes it again"
            ) from None
