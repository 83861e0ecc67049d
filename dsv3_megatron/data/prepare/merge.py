"""Folders of shards joined into one: the parts of one preparation, or folders that were prepared each by itself.

Parts become what one process without parts makes, to the byte: their tasks are finished together, so copies are found
across them. Folders keep their shards, as parts of the sources with their names; copies between them stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Counts
from dsv3_megatron.data.prepare.finish import Finishing, add_counts, check_documents, link_or_copy, put
from dsv3_megatron.data.prepare.output import PART, PARTS, WORK, Output, Part
from dsv3_megatron.data.prepare.shard import write_manifest
from dsv3_megatron.data.source.origins import FILES
from dsv3_megatron.data.source.shard_table import ShardRow, open_table
from dsv3_megatron.data.source.shards import MANIFEST, TOKENIZER, Manifest, Shard, Source, file_sha256, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_atomically
from parallel.errors import DataError

_DIFFER = ("weights", "shard_tokens", "deduplicate", "fingerprint")  # what folders need not have in common
_MOST_PARTS = (1 << 16) - 1  # that a table can number


def merge(
    inputs: Sequence[str],
    output: str,
    *,
    memory: int,
    workers: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Join folders into ``output`` and return its manifest. Files are linked, or copied where they cannot be; the
    folders joined stay as they are. A merge that was killed begins again.

    Args:
        inputs: parts, or finished folders; a folder that holds ``parts`` stands for these.
        memory: bytes for finding copies among parts.
        tell: gets what a person should know, line by line.
    Raises: DataError: a part is missing, not finished or there twice; tokenizers or options differ.
    """
    folders = _folders(inputs)
    parts = [folder for folder in folders if (folder / PART).exists()]
    if parts and len(parts) < len(folders):
        other = next(folder for folder in folders if folder not in parts)
        raise DataError(f"input = {parts[0]} is a part and {other} is a folder by itself; merge the parts first")
    result = Output(output)
    if (result.folder / MANIFEST).exists():
        raise DataError(f"output = {output} is finished already; name another folder, or remove its {MANIFEST}")
    with result.locked():
        manifest = _join_parts(parts, result, memory, workers) if parts else _join_folders(folders, result, tell)
        result.close()
    return manifest


def _folders(inputs: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for given in map(Path, inputs):
        if (given / PARTS).is_dir() and not (given / MANIFEST).exists():
            found += sorted(path for path in (given / PARTS).iterdir() if path.is_dir())
        elif any((given / name).exists() for name in (PART, MANIFEST, WORK)):
            found.append(given)
        else:
            raise DataError(f"input = {given} is no folder that launcher/prepare_data.py wrote; name one")
    for folder in found:
        if not (folder / PART).exists() and not (folder / MANIFEST).exists():
            raise DataError(f"input = {folder} is not finished; run its launcher/prepare_data.py again")
    seen: set[Path] = set()
    for folder in found:
        if folder.resolve() in seen:
            raise DataError(f"input = {folder} is named twice; leave one out")
        seen.add(folder.resolve())
    return found


# -- parts -------------------------------------------------------------------------------------------------------------


def _join_parts(folders: list[Path], output: Output, memory: int, workers: int) -> Manifest:
    parts = [_read_part(folder) for folder in folders]
    first = parts[0]
    for folder, part in zip(folders, parts):
        if part.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(f"input = {folder} has another tokenizer than {folders[0]}; prepare both with one")
        if (part.digest, part.parts) != (first.digest, first.parts):
            raise DataError(
                f"input = {folder} is a part of another preparation than {folders[0]}: its inputs, options or "
                "number of parts differ; prepare it with the same"
            )
    numbers = [part.part for part in parts]
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise DataError(f"part {twice[0]} of {first.parts} is named twice; leave one out")
    if missing := sorted({*range(1, first.parts + 1)} - {*numbers}):
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise DataError(f"part {shown} of {first.parts} is missing; prepare it with part={missing[0]}/{first.parts}")
    tasks = [(folder / WORK / "shards", task) for folder in folders for task in Output(folder).done()]
    tasks.sort(key=lambda each: each[1].key)
    finishing = Finishing(
        output.folder,
        output.work,
        first.sources,
        first.vocab_size,
        float(first.options["held_out"]),
        bool(first.options["deduplicate"]),
        memory,
        moves=False,
        workers=workers,
    )
    done, shards, examples = finishing.run(tasks)
    for source in done:
        link_or_copy(folders[0] / source.name / FILES, output.folder / source.name / FILES)
    examples = [*examples, *first.skipped][:KEPT_EXAMPLES]
    tokenizer = _tokenizer(folders[0], output)
    return write_manifest(
        output.folder, done, shards, tokenizer, {**first.options, "fingerprint": first.digest}, examples
    )


def _read_part(folder: Path) -> Part:
    try:
        return Part.model_validate_json((folder / PART).read_text())
    except (ValidationError, ValueError, OSError) as error:
        raise DataError(
            f"{folder / PART} cannot be read ({str(error).splitlines()[0]}); prepare the part anew"
        ) from None


# -- folders -----------------------------------------------------------------------------------------------------------


def _join_folders(folders: list[Path], output: Output, tell: Callable[[str], None]) -> Manifest:
    manifests = [read_manifest(folder) for folder in folders]
    _check_alike(folders, manifests)
    if manifests[0].options.get("deduplicate"):
        tell("copies of a document that lie in two of the folders stay: prepare one folder in parts to find them")
    joined = _Joined(output.folder)
    for folder, manifest in zip(folders, manifests):
        joined.add(folder, manifest)
    sources = list(joined.sources.values())
    examples = [line for manifest in manifests for line in manifest.bad_examples][:KEPT_EXAMPLES]
    check_documents(sources, examples)
    weights = [source.weight for source in sources]
    options = {
        **manifests[0].options,
        "weights": weights if any(weights) else None,
        "fingerprint": hashlib.blake2b(
            json.dumps([manifest.table_sha256 for manifest in manifests]).encode(), digest_size=16
        ).hexdigest(),
    }
    return write_manifest(
        output.folder, sources, joined.shards, _tokenizer(folders[0], output), options, examples
    )  # fmt: skip


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
            shard = put(folder, _shard_of(row), name, self._folder, moves=False)
            self.shards.append(_moved_origins(self._folder, shard, before[source_name]))

    def _take(self, folder: Path, source: Source) -> int:
        """Count a folder's source, take its list of files, and return how many files the source had before."""
        (self._folder / source.name).mkdir(parents=True, exist_ok=True)
        mine = self._folder / source.name / FILES
        listed = folder / source.name / FILES
        text = listed.read_text() if listed.exists() else ""
        if (known := self.sources.get(source.name)) is None:
            self.sources[source.name] = source.model_copy(deep=True)
            write_atomically(mine, text)
            return 0
        earlier = mine.read_text()
        write_atomically(mine, earlier + text)
        add_counts(known, Counts(**{name: getattr(source, name) for name in Counts.model_fields}))
        known.input = f"{known.input}, {source.input}"
        known.files += source.files
        known.skipped += source.skipped
        return earlier.count("\n")


def _shard_of(row: ShardRow) -> Shard:
    return Shard(
        name=row.name,
        documents=row.documents,
        tokens=row.tokens,
        sha256={"bin": row.bin_sha256.hex(), "idx": row.idx_sha256.hex()},
        bytes={"bin": row.bin_bytes, "idx": row.idx_bytes},
        origin_sha256=None if row.origin_sha256 is None else row.origin_sha256.hex(),
        first_file=row.first_file,
        first_row=row.first_row,
    )


def _moved_origins(folder: Path, shard: Shard, files: int) -> Shard:
    """Return a shard whose documents come from files that are numbered ``files`` higher than they were."""
    if not files or shard.origin_sha256 is None:
        return shard
    path = folder / f"{shard.name}.origin.npy"
    origins = np.load(path)
    origins["file"] += files
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, origins)
    partial.replace(path)  # the linked file stays what it is
    return shard.model_copy(
        update={"origin_sha256": file_sha256(path), "first_file": shard.first_file + files}
    )  # fmt: skip


def _tokenizer(folder: Path, output: Output) -> Tokenizer:
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    tokenizer.save(output.folder / TOKENIZER)
    return tokenizer
