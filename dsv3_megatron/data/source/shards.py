"""Token shards: megatron-core's indexed files (.bin tokens, .idx lengths) and the manifest that vouches for them.

A folder that prepare_data wrote holds

    manifest.json               small at any size: tokenizer, options, sources with their counts
    shards.npy                  a row for each shard (:mod:`~dsv3_megatron.data.source.shard_table`)
    tokenizer.json
    SOURCE/SPLIT_00000.bin .idx .origin.npy     tokens, lengths, and where each document comes from
    SOURCE/files.jsonl          the input files of a source; their numbers are its lines from 0

A document is its tokens and the end token; the reader puts the begin token, fill-in-the-middle and packing on top, so
that the same shards serve every recipe.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from dsv3_megatron.data.begun import unfinished
from parallel.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
VERSION = 2
ORIGIN = np.dtype([("file", "<u4"), ("row", "<u8")])  # of a document: number of its input file, and row in it


class Shard(BaseModel):
    """One shard as it was written: what a journal keeps, and the table holds in a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="path without suffix, inside the folder")
    documents: int
    tokens: int
    sha256: dict[Literal["bin", "idx"], str]
    bytes: dict[Literal["bin", "idx"], int]
    origin_sha256: str | None = Field(None, description="of .origin.npy; null = it is not known where documents are of")
    first_file: int = Field(0, description="origin of its first document: number of the input file")
    first_row: int = Field(0, description="and row in it: from 1, or 0 where the file is the document")


class Totals(BaseModel):
    """What the shards of a source's split hold together."""

    model_config = ConfigDict(extra="forbid")

    shards: int = 0
    documents: int = 0
    tokens: int = 0


def _no_shards() -> dict[Split, Totals]:
    return {split: Totals() for split in SPLITS}


class Source(BaseModel):
    """One input of prepare_data and what became of it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    input: str
    weight: Annotated[float, Field(gt=0)] | None = Field(None, description="share of samples; null = by its tokens")
    files: int = 0
    ignored_files: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    bad: int = Field(0, description="rows and whole texts that could not be read")
    bad_bytes: int = Field(0, description="in those rows and texts")
    torn: int = Field(0, description="places from which on a file could not be read")
    torn_bytes: int = Field(0, description="on disk, from there on: nobody knows how many rows they held")
    skipped: int = Field(0, description="links that are not followed, pipes, hidden files and folders")
    shards: dict[Split, Totals] = Field(default_factory=_no_shards)


class Manifest(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    tokenizer_sha256: str
    vocab_size: int
    options: dict[str, object]
    sources: list[Source]
    bad_examples: list[str] = []
    table_sha256: str = Field(description="of shards.npy: a table of another time is noticed")
    _listed: list[Shard] | None = PrivateAttr(None)  # version 1 names its shards here, and has no table


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a folder of shards; no shard is looked at
    (:func:`~dsv3_megatron.data.source.shard_table.check_files`).

    Raises: DataError: the folder is not one, or is not complete.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = unfinished(folder) or "holds no manifest.json; name a folder that launcher/prepare_data.py wrote"
        raise DataError(f"data.path = {folder} {what}")
    try:
        manifest = _Version.model_validate_json(path.read_text())
        if manifest.version == 1:
            return _of_version_1(path.read_text())
        if manifest.version == VERSION:
            return Manifest.model_validate_json(path.read_text())
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); prepare the folder again") from None
    raise DataError(f"{path} has version {manifest.version}, this code reads {VERSION}; prepare the folder again")


class _Version(BaseModel):
    version: int


class _SourceOfVersion1(Source):
    shards: dict[Split, list[Shard]]  # type: ignore[assignment]


class _ManifestOfVersion1(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    tokenizer_sha256: str
    vocab_size: int
    options: dict[str, object]
    sources: list[_SourceOfVersion1]
    bad_examples: list[str] = []


def _of_version_1(text: str) -> Manifest:
    """Return a manifest that lists its shards itself: the table is made of them in memory."""
    old = _ManifestOfVersion1.model_validate_json(text)
    sources = []
    for source in old.sources:
        totals = {
            split: Totals(
                shards=len(shards), documents=sum(s.documents for s in shards), tokens=sum(s.tokens for s in shards)
            )
            for split, shards in source.shards.items()
        }
        sources.append(Source(**{**source.model_dump(exclude={"shards"}), "shards": {**_no_shards(), **totals}}))
    listed = [shard for source in old.sources for split in SPLITS for shard in source.shards.get(split, [])]
    manifest = Manifest(
        **{**old.model_dump(exclude={"sources"}), "sources": sources},
        table_sha256=hashlib.sha256("".join(shard.model_dump_json() for shard in listed).encode()).hexdigest(),
    )
    manifest._listed = listed
    return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return how ids below ``vocab_size`` lie in a .bin, as megatron-core's ``DType.optimal_dtype`` decides."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def stored_alike(one: int, other: int) -> bool:
    """Return whether the ids of two vocabularies, by their sizes, are written with the same number of bytes."""
    return token_dtype(one) == token_dtype(other)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def open_shard(folder: str | Path, shard: _Named) -> IndexedDataset:
    """Return a shard as megatron-core reads it, memory-mapped."""
    return _indexed_dataset().IndexedDataset(str(Path(folder) / shard.name), mmap=True)


def _indexed_dataset() -> Any:
    # megatron-core takes seconds to import, and reading a manifest needs none of it
    from dsv3_megatron.megatron.host import adapt_host

    adapt_host()
    from megatron.core.datasets import indexed_dataset  # likewise

    return indexed_dataset


_INDEX_MARK = b"MMIDIDX\0\0"
_INDEX_HEAD = struct.Struct("<9sQBQQ")  # megatron-core: mark, version, code of the type, sequences, documents and one
_DTYPE_CODES = {np.dtype("<i4"): 4, np.dtype("<u2"): 8}  # megatron-core's numbers for them


class ShardWriter:
    """One shard while it is written: beside its place, under a name that no reader looks for.

    Writes what megatron-core's ``IndexedDatasetBuilder`` writes, to the byte, without importing torch: many processes
    write at once, and each would hold it in memory.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int):
        """Write ids below ``vocab_size``, in two bytes each where they fit, else in four."""
        self._folder, self._name, self._vocab_size = folder, name, vocab_size
        self._partial = folder / f"{name}.partial"
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._dtype = token_dtype(vocab_size)
        self._bin = open(f"{self._partial}.bin", "wb")  # noqa: SIM115  (commit closes it)
        self._digest = hashlib.sha256()
        self._lengths: list[int] = []
        self._origins: list[np.ndarray] | None = None
        self.documents = self.tokens = 0

    def add(self, documents: Iterable[np.ndarray], origins: Iterable[tuple[int, int]] | None = None) -> None:
        """Append documents, each [tokens] with its end token.

        Args:
            origins: (file, row) of each document, in ascending order; None = not known, for all of a shard or for none.
        Raises: DataError: for an id that the file cannot hold.
        """
        before = self.documents
        for document in documents:
            # it would be wrapped, and the shard would hold another token
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) < self._vocab_size:
                raise DataError(
                    f"{self._name}: token {int(document.max())} is none of the tokenizer's {self._vocab_size} ids; "
                    "name another tokenizer"
                )
            data = document.astype(self._dtype).tobytes()
            self._bin.write(data)
            self._digest.update(data)
            self._lengths.append(len(document))
            self.documents += 1
            self.tokens += len(document)
        if origins is not None:
            found = np.asarray(origins if isinstance(origins, np.ndarray) else list(origins), dtype=ORIGIN)
            assert before == sum(map(len, self._origins or [])), "origins of all documents of a shard, or of none"
            assert len(found) == self.documents - before, (len(found), self.documents - before)
            self._origins = [*(self._origins or []), found]
        assert self._origins is None or origins is not None, "origins of all documents of a shard, or of none"

    def commit(self) -> Shard:
        """Finish the files, put them in their place and return what the table says of them."""
        self._bin.close()
        Path(f"{self._partial}.idx").write_bytes(self._index())
        suffixes = ["bin", "idx"]
        origins = None if self._origins is None else np.concatenate(self._origins)
        if origins is not None:
            np.save(f"{self._partial}.origin.npy", origins)
            suffixes.append("origin.npy")
        sha256, sizes = {}, {}
        for suffix in suffixes:
            partial = Path(f"{self._partial}.{suffix}")
            sha256[suffix] = self._digest.hexdigest() if suffix == "bin" else file_sha256(partial)
            sizes[suffix] = partial.stat().st_size
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self._folder / f"{self._name}.{suffix}")
        first = (0, 0) if origins is None or not len(origins) else tuple(map(int, origins[0]))
        return Shard(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            origin_sha256=sha256.pop("origin.npy", None),
            sha256=sha256,
            bytes={suffix: sizes[suffix] for suffix in sha256},
            first_file=first[0],
            first_row=first[1],
        )

    def _index(self) -> bytes:
        """Return the .idx: of each document its length, where it begins in the .bin, and that it is one sequence."""
        lengths = np.asarray(self._lengths, dtype="<i8")
        begins = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        head = _INDEX_HEAD.pack(_INDEX_MARK, 1, _DTYPE_CODES[self._dtype], len(lengths), len(lengths) + 1)
        ends = np.arange(len(lengths) + 1, dtype="<i8")
        return head + lengths.astype("<i4").tobytes() + begins.tobytes() + ends.tobytes()


class _Counted(_Named, Protocol):
    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int: ...


def read_lengths(folder: str | Path, shard: _Counted, vocab_size: int) -> np.ndarray:
    """Return the tokens of each document of a shard, end tokens included: [documents] int64.

    Raises: DataError: the .idx is not that of the shard.
    """
    path = f"{folder}/{shard.name}.idx"
    try:
        with open(path, "rb") as file:
            head = file.read(_INDEX_HEAD.size)
            lengths = np.fromfile(file, dtype="<i4", count=shard.documents).astype(np.int64)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it") from None
    expected = (_INDEX_MARK, 1, _DTYPE_CODES[token_dtype(vocab_size)], shard.documents)
    if len(head) < _INDEX_HEAD.size or _INDEX_HEAD.unpack(head)[:4] != expected or lengths.sum() != shard.tokens:
        raise DataError(
            f"{path} does not hold {shard.documents} documents of {shard.tokens} tokens as the table of shards says; "
            "restore it or prepare the folder again"
        )
    return lengths
