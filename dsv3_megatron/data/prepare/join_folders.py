"""Folders of shards that were prepared each by itself, joined; copies of a document between them stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Counts
from dsv3_megatron.data.prepare.finish import add_counts, check_documents, put
from dsv3_megatron.data.prepare.output import Output, held_out_of
from dsv3_megatron.data.prepare.shard import write_manifest
from dsv3_megatron.data.source.origins import FILES, read_list
from dsv3_megatron.data.source.shard_table import ShardRow, open_table
from dsv3_megatron.data.source.shards import (
    ORIGIN,
    TOKENIZER,
    Manifest,
    Shard,
    Source,
    file_sha256,
    read_manifest,
)
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_DIFFER = ("weights", "shard_tokens", "deduplicate", "fingerprint")  # what folders need not have in common
_MOST_PARTS = (1 << 16) - 1  # that a table can number


class FoldersJoin:
    """Folders that were prepared each by itself: their shards become parts of the sources with their names."""

    def __init__(self, folders: list[Path], tell: Callable[[str], None]):
        """Raises: DataError: a folder is not finished, or their tokenizers, options or weights do not fit together."""
        self._folders, self._tell = folders, tell
        self._manifests = [read_manifest(folder) for folder in folders]
        for folder, manifest in zip(folders, self._manifests):
            held_out_of(manifest.options, folder)
        _check_alike(folders, self._manifests)
        said = json.dumps([manifest.model_dump(mode="json") for manifest in self._manifests])
        self.fingerprint = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        self.tokenizer = Tokenizer.load(folders[0] / TOKENIZER)

    def run(self, output: Output) -> Manifest:
        """Join them source by source."""
        first = self._manifests[0]
        if first.options.get("deduplicate"):
            self._tell("copies of a document that lie in two of the folders stay: prepare one folder in parts to find "
                       "them")  # fmt: skip
        joined = _Joined(output.folder)
        for folder, manifest in zip(self._folders, self._manifests):
            joined.add(folder, manifest)
        sources = list(joined.sources.values())
        examples = [line for manifest in self._manifests for line in manifest.bad_examples][:KEPT_EXAMPLES]
        check_documents(sources, examples)
        weights = [source.weight for source in sources]
        options = {
            **first.options, "weights": weights if any(weights) else None, "fingerprint": self.fingerprint
        }  # fmt: skip
        self.tokenizer.save(output.folder / TOKENIZER)
        return write_manifest(output.folder, sources, joined.shards, self.tokenizer, options, examples)


def _check_alike(folders: list[Path], manifests: list[Manifest]) -> None:
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:]):
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(f"input = {folder} has another tokenizer than {folders[0]}; prepare both with one")
        for key in sorted({*first.options, *manifest.options} - {*_DIFFER}):
            one, other = first.options.get(key), manifest.options.get(key)
            if one != other:
                raise DataError(
                    f"input = {folder} was prepared with {key}={other}, {folders[0]} with {key}={one}; "
                    "prepare both with the same"
                )
    weights: dict[str, float | None] = {}
    for source in (source for manifest in manifests for source in manifest.sources):
        if weights.setdefault(source.name, source.weight) != source.weight:
            raise DataError(
                f"source {source.name} has the weights {weights[source.name]} and {source.weight}; "
                "prepare both with the same"
            )
    if any(weights.values()) and not all(weights.values()):
        some, none = (next(name for name, w in weights.items() if bool(w) is is_so) for is_so in (True, False))
        raise DataError(
            f"source {some} has a weight and {none} has none; prepare all with weights or none, and set data.weights"
        )


class _Joined:
    """Sources and shards of folders, as they are called in the folder that joins them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.sources: dict[str, Source] = {}
        self.shards: list[Shard] = []
        self._parts: dict[str, int] = {}  # of a source, how many it has
        self._numbers: dict[tuple[str, int, str], int] = {}

    def add(self, folder: Path, manifest: Manifest) -> None:
        """Take the shards of a folder."""
        before: dict[str, int] = {}  # of a source, its input files in the folders before
        parts: dict[tuple[str, int], int] = {}  # here -> joined
        for source in manifest.sources:
            before[source.name] = self._take(folder, source)
        for row in open_table(folder, manifest):
            source_name = manifest.sources[row.source].name
            if (key := (source_name, row.part)) not in parts:
                parts[key] = self._parts[source_name] = self._parts.get(source_name, 0) + 1
                if parts[key] > _MOST_PARTS:
                    raise DataError(
                        f"source {source_name} would have more than {_MOST_PARTS} parts; merge fewer folders"
                    )
            part = parts[key]
            number = self._numbers.get((source_name, part, row.split), 0)
            self._numbers[source_name, part, row.split] = number + 1
            name = f"{source_name}/{row.split}_p{part:03d}_{number:05d}"
            shard = put(folder, _shard_of(row, manifest.has_sums), name, self._folder, moves=False)
            self.shards.append(_moved_origins(self._folder, shard, before[source_name]))

    def _take(self, folder: Path, source: Source) -> int:
        """Count a folder's source, take its list of files, and return how many files the source had before."""
        (self._folder / source.name).mkdir(parents=True, exist_ok=True)
        mine = self._folder / source.name / FILES
        text = read_list(folder, source.name)
        if (known := self.sources.get(source.name)) is None:
            self.sources[source.name] = source.model_copy(deep=True)
            write_atomically(mine, text)
            return 0
        earlier = read_list(self._folder, source.name)
        write_atomically(mine, earlier + text)
        add_counts(known, Counts(**{name: getattr(source, name) for name in Counts.model_fields}))
        known.input = f"{known.input}, {source.input}"
        known.files += source.files
        known.skipped += source.skipped
        return earlier.count("\n")


def _shard_of(row: ShardRow, has_sums: bool) -> Shard:
    return Shard(
        name=row.name,
        documents=row.documents,
        tokens=row.tokens,
        sha256={"bin": row.bin_sha256.hex(), "idx": row.idx_sha256.hex()},
        bytes={"bin": row.bin_bytes, "idx": row.idx_bytes},
        origin_sha256=None if row.origin_sha256 is None else row.origin_sha256.hex(),
        first_file=row.first_file,
        first_row=row.first_row,
        has_sums=has_sums,
    )


def _moved_origins(folder: Path, shard: Shard, files: int) -> Shard:
    """Return a shard whose documents come from files that are numbered ``files`` higher than they were."""
    if not files or shard.origin_sha256 is None:
        return shard
    path = folder / f"{shard.name}.origin.npy"
    try:
        if file_sha256(path) != shard.origin_sha256:
            raise ValueError("has another SHA-256 than its table says")
        origins = open_npy(path, ORIGIN, shard.documents)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({why_unread(error)}); restore it in its folder") from None
    origins["file"] += files
    partial = path.with_name(f"{path.name}.partial")
    with new_file(partial) as file:
        np.save(file, origins)
    partial.replace(path)  # the linked file stays what it is
    return shard.model_copy(
        update={"origin_sha256": file_sha256(path), "first_file": shard.first_file + files}
    )  # fmt: skip
