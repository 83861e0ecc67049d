"""Token shards: megatron-core's indexed files (.bin tokens, .idx lengths) and the manifest that vouches for them.

A folder that prepare_data wrote holds

    manifest.json               small at any size: tokenizer, options, sources with their counts
    shards.npy                  a row for each shard (:mod:`~dsv3_megatron.data.source.shard_table`)
    tokenizer.json
    SOURCE/SPLIT_00000.bin .idx .origin.npy     tokens, lengths, and where each document comes from
    SOURCE/SPLIT_00000.sums     checksums of the blocks of .bin, compared when they are read (data/checked/blocks.py)
    SOURCE/files.jsonl          the input files of a source; their numbers are its lines from 0

A document is its tokens and the end token; the reader puts the begin token, fill-in-the-middle and packing on top, so
that the same shards serve every recipe.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from dsv3_megatron.data.begun import unfinished
from dsv3_megatron.data.checked.blocks import BlockSums
from dsv3_megatron.run.handed import is_inner, open_regular, parse_json, read_text
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError, one_line

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
VERSION = 2
SUFFIXES = ("bin", "idx", "origin.npy", "sums")  # of the files of a shard
ORIGIN = np.dtype([("file", "<u4"), ("row", "<u8")])  # of a document: number of its input file, and row in it


_T = TypeVar("_T")
_OfFiles = Annotated[dict[Literal["bin", "idx"], _T], Field(min_length=2)]
Count = Annotated[int, Field(ge=0, lt=1 << 62, strict=True)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(BaseModel):
    """One shard as it was written: what a journal keeps, and the table holds in a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="path without suffix, inside the folder")
    documents: Count
    tokens: Count
    sha256: _OfFiles[Sha256]
    bytes: _OfFiles[Count]
    origin_sha256: Sha256 | None = Field(
        None, description="of .origin.npy; null = it is not known where documents are of"
    )
    first_file: Annotated[Count, Field(lt=1 << 32)] = Field(
        0, description="origin of its first document: number of the input file"
    )
    first_row: Count = Field(0, description="and row in it: from 1, or 0 where the file is the document")
    has_sums: bool = Field(False, description="whether .sums is there: earlier versions wrote none")

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if not is_inner(name):
            raise ValueError(f"{name!r} is no name inside the folder")
        return name

    @property
    def suffixes(self) -> list[str]:
        """Those of its files."""
        there = {"origin.npy": self.origin_sha256 is not None, "sums": self.has_sums}
        return [suffix for suffix in SUFFIXES if there.get(suffix, True)]


class Totals(BaseModel):
    """What the shards of a source's split hold together."""

    model_config = ConfigDict(extra="forbid")

    shards: Count = 0
    documents: Count = 0
    tokens: Count = 0


def _no_shards() -> dict[Split, Totals]:
    return {split: Totals() for split in SPLITS}


class Source(BaseModel):
    """One input of prepare_data and what became of it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    input: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="share of samples; null = by its tokens"
    )
    files: Count = 0
    ignored_files: Count = 0
    documents: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    duplicates: Count = 0
    empty: Count = 0
    bad: Count = Field(0, description="rows and whole texts that could not be read")
    bad_bytes: Count = Field(0, description="in those rows and texts")
    torn: Count = Field(0, description="places from which on a file could not be read")
    torn_bytes: Count = Field(0, description="on disk, from there on: nobody knows how many rows they held")
    skipped: Count = Field(0, description="links that are not followed, pipes, hidden files and folders")
    shards: dict[Split, Totals] = Field(default_factory=_no_shards, min_length=len(SPLITS))

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or one_line(name) != name:
            raise ValueError(f"{name!r} is no name of a folder inside this one")
        return name


def _no_two_alike(sources: list[Source]) -> list[Source]:
    counts = Counter(source.name for source in sources)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"source {twice[0]!r} is there twice")
    return sources


Sources = Annotated[list[Source], AfterValidator(_no_two_alike)]
VocabularySize = Annotated[int, Field(ge=1, lt=1 << 31, strict=True)]


class Manifest(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(extra="forbid")

    version: Count = VERSION
    tokenizer_sha256: str
    vocab_size: VocabularySize
    options: dict[str, object]
    sources: Sources
    bad_examples: list[str] = []
    table_sha256: str = Field(description="of shards.npy: a table of another time is noticed")
    has_sums: bool = Field(False, description="whether every shard has its .sums (launcher/data.py check writes them)")
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
        content = parse_json(read_text(path), unique=True)
        version = content.get("version") if isinstance(content, dict) else None
        if version == 1:
            return _of_version_1(content)
        if version == VERSION or not isinstance(version, int):  # of which it is said what is wrong with it
            return Manifest.model_validate(content)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({why_unread(error)}); restore it or prepare the folder again"
        ) from None
    raise DataError(f"{path} has version {version}, this code reads {VERSION}; prepare the folder again")


class _SourceOfVersion1(Source):
    shards: dict[Split, list[Shard]]  # type: ignore[assignment]


class _ManifestOfVersion1(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Count
    tokenizer_sha256: str
    vocab_size: VocabularySize
    options: dict[str, object]
    sources: list[_SourceOfVersion1]
    bad_examples: list[str] = []
    has_sums: bool = False


def _of_version_1(content: object) -> Manifest:
    """Return a manifest that lists its shards itself: the table is made of them in memory."""
    old = _ManifestOfVersion1.model_validate(content)
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
        table_sha256=hashlib.sha256(
            "".join(shard.model_dump_json(exclude={"has_sums"}) for shard in listed).encode()
        ).hexdigest(),
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
    """Return the SHA-256 of a file. Raises OSError: it cannot be read."""
    with open_regular(path) as file:
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
        self._bin = new_file(Path(f"{self._partial}.bin"))
        self._digest, self._sums = hashlib.sha256(), BlockSums()
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
            self._sums.add(data)
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
        origins = None if self._origins is None else np.concatenate(self._origins)
        written = {"idx": self._index(), "sums": self._sums.content()}
        if origins is not None:
            written["origin.npy"] = _as_npy(origins)
        for suffix, content in written.items():
            with new_file(Path(f"{self._partial}.{suffix}")) as file:
                file.write(content)
        sha256 = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in written.items()}
        sha256["bin"] = self._digest.hexdigest()
        sizes = {}
        for suffix in sha256:
            partial = Path(f"{self._partial}.{suffix}")
            sizes[suffix] = partial.stat().st_size
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self._folder / f"{self._name}.{suffix}")
        first = (0, 0) if origins is None or not len(origins) else tuple(map(int, origins[0]))
        return Shard(
            name=self._name,
            documents=self.documents,
            tokens=self.tokens,
            sha256={"bin": sha256["bin"], "idx": sha256["idx"]},
            bytes={"bin": sizes["bin"], "idx": sizes["idx"]},
            origin_sha256=sha256.get("origin.npy"),
            first_file=first[0],
            first_row=first[1],
            has_sums=True,
        )

    def _index(self) -> bytes:
        """Return the .idx: of each document its length, where it begins in the .bin, and that it is one sequence."""
        lengths = np.asarray(self._lengths, dtype="<i8")
        begins = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        head = _INDEX_HEAD.pack(_INDEX_MARK, 1, _DTYPE_CODES[self._dtype], len(lengths), len(lengths) + 1)
        ends = np.arange(len(lengths) + 1, dtype="<i8")
        return head + lengths.astype("<i4").tobytes() + begins.tobytes() + ends.tobytes()


def _as_npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


class _Indexed(_Named, Protocol):
    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int: ...


def index_bytes(documents: int) -> int:
    """Return how long the .idx of so many documents is."""
    return _INDEX_HEAD.size + 4 * documents + 8 * documents + 8 * (documents + 1)


def read_lengths(folder: str | Path, shard: _Indexed, vocab_size: int, sha256: bytes | None = None) -> np.ndarray:
    """Return the tokens of each document of a shard, end tokens included: [documents] int64.

    Args:
        sha256: of the .idx; None = it is not compared.
    Raises: DataError: the .idx is not that of the shard.
    """
    path, size = f"{folder}/{shard.name}.idx", index_bytes(shard.documents)
    try:
        with open_regular(Path(path)) as file:
            found = os.fstat(file.fileno()).st_size  # before memory is asked for
            content = file.read(size) if found == size else b""
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({why_unread(error)}); restore it") from None
    expected = (_INDEX_MARK, 1, _DTYPE_CODES[token_dtype(vocab_size)], shard.documents)
    lengths = np.frombuffer(content, "<i4", shard.documents, _INDEX_HEAD.size) if content else _NO_LENGTHS
    if (
        not content
        or _INDEX_HEAD.unpack(content[: _INDEX_HEAD.size])[:4] != expected
        or (shard.documents and int(lengths.min()) < 1)
        or int(lengths.sum(dtype=np.int64)) != shard.tokens
    ):
        raise DataError(
            f"{path} does not hold {shard.documents} documents of {shard.tokens} tokens as the table of shards says; "
            "restore it or prepare the folder again"
        )
    if sha256 is not None and hashlib.sha256(content).digest() != sha256:
        raise DataError(f"{path} has another SHA-256 than the table of shards says; restore it")
    return lengths.astype(np.int64)


_NO_LENGTHS = np.zeros(0, dtype="<i4")
