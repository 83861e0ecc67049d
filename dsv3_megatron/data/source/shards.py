"""Token shards: megatron-core's indexed files (.bin tokens, .idx lengths) and the manifest that vouches for them.

A folder that prepare_data wrote holds ``manifest.json``, ``tokenizer.json`` and ``<source>/<split>_00000.bin, .idx``.
A document is its tokens and the end token; the reader puts the begin token, fill-in-the-middle and packing on top, so
that the same shards serve every recipe.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.megatron.host import adapt_host
from parallel.errors import DataError

adapt_host()

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
VERSION = 1


class Shard(BaseModel):
    """One pair of files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="path without suffix, inside the folder")
    documents: int
    tokens: int
    sha256: dict[Literal["bin", "idx"], str]
    bytes: dict[Literal["bin", "idx"], int]


def _no_shards() -> dict[Split, list[Shard]]:
    return {split: [] for split in SPLITS}


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
    bad: int = 0
    shards: dict[Split, list[Shard]] = Field(default_factory=_no_shards)


class Manifest(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    tokenizer_sha256: str
    vocab_size: int
    options: dict[str, object]
    sources: list[Source]
    bad_examples: list[str] = []


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a folder of shards, every file of which is there with the size it was written with.

    Raises: DataError: the folder is not one, is not complete, or a file is missing or cut.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        begun = (Path(folder) / ".prepare").exists()
        what = "was begun and is not finished; run the same launcher/prepare_data.py again" if begun else (
            "holds no manifest.json; name a folder that launcher/prepare_data.py wrote"
        )  # fmt: skip
        raise DataError(f"data.path = {folder} {what}")
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); prepare the folder anew") from None
    if manifest.version != VERSION:
        raise DataError(f"{path} has version {manifest.version}, this code reads {VERSION}; prepare the folder anew")
    for shard in (s for source in manifest.sources for split in SPLITS for s in source.shards[split]):
        for suffix, size in shard.bytes.items():
            file = Path(folder) / f"{shard.name}.{suffix}"
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise DataError(
                    f"{file} {state}, the manifest says {size} bytes; restore it or prepare the folder anew"
                )
    return manifest


def verify_checksums(folder: str | Path, manifest: Manifest) -> None:
    """Read every shard and compare its SHA-256. Raises DataError naming the first that differs."""
    for shard in (s for source in manifest.sources for split in SPLITS for s in source.shards[split]):
        for suffix, expected in shard.sha256.items():
            file = Path(folder) / f"{shard.name}.{suffix}"
            if (found := file_sha256(file)) != expected:
                raise DataError(f"{file} has sha256 {found[:12]}.., the manifest says {expected[:12]}..; restore it")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(folder: str | Path, shard: Shard) -> IndexedDataset:
    """Return a shard, memory-mapped."""
    return IndexedDataset(str(Path(folder) / shard.name), mmap=True)


def stored_alike(one: int, other: int) -> bool:
    """Return whether the ids of two vocabularies, by their sizes, are written with the same number of bytes."""
    return DType.optimal_dtype(one) == DType.optimal_dtype(other)


class ShardWriter:
    """One shard while it is written: beside its place, under a name that no reader looks for."""

    def __init__(self, folder: Path, name: str, vocab_size: int):
        """Write ids below ``vocab_size``, in two bytes each where they fit, else in four."""
        self._folder, self._name, self._vocab_size = folder, name, vocab_size
        self._dtype = DType.optimal_dtype(vocab_size)
        self._partial = folder / f"{name}.partial"
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(f"{self._partial}.bin", dtype=self._dtype)
        self.documents = self.tokens = 0

    def add(self, documents: Iterable[np.ndarray]) -> None:
        """Append documents, each [tokens] with its end token. Raises DataError for an id that the file cannot hold."""
        for document in documents:
            # megatron-core's builder would wrap it, and the shard would hold another token
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) < self._vocab_size:
                raise DataError(
                    f"{self._name}: token {int(document.max())} is none of the tokenizer's {self._vocab_size} ids; "
                    "name another tokenizer"
                )
            self._builder.add_document(document, [len(document)])
            self.documents += 1
            self.tokens += len(document)

    def commit(self) -> Shard:
        """Finish both files, put them in their place and return what the manifest says of them."""
        self._builder.finalize(f"{self._partial}.idx")
        sha256, sizes = {}, {}
        for suffix in ("bin", "idx"):
            partial = Path(f"{self._partial}.{suffix}")
            sha256[suffix], sizes[suffix] = file_sha256(partial), partial.stat().st_size
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self._folder / f"{self._name}.{suffix}")
        return Shard(
            name=self._name, documents=self.documents, tokens=self.tokens, sha256=sha256, bytes=sizes
        )  # fmt: skip
