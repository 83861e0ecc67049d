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

from dsv3_megatron.data.begun import PART, PARTS, WORK, typed_command, unfinished
from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Counts, Done
from dsv3_megatron.data.prepare.finish import Finishing, add_counts, check_documents, link_or_copy, put
from dsv3_megatron.data.prepare.inputs import printable
from dsv3_megatron.data.prepare.output import Output, Part
from dsv3_megatron.data.prepare.pack import PackAhead
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
    ahead: PackAhead | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Join folders into ``output`` and return its manifest. Files are linked, or copied where they cannot be; the
    folders joined stay as they are. A merge that was killed is done again by the same call, one that is done is left.

    Args:
        inputs: parts, or finished folders; a folder that holds ``parts`` stands for these.
        memory: bytes for finding copies among parts.
        ahead: what to pack the joined shards for.
        tell: gets what a person should know, line by line.
    Raises: DataError: a part is missing, not finished or there twice; tokenizers or options differ; the output holds
    something else; documents cannot be packed as ``ahead`` says. RunInUseError: another process works in the output.
    """
    ahead = ahead or PackAhead()
    folders = _folders(inputs, Path(output))
    parts = [folder for folder in folders if (folder / PART).exists()]
    if parts and len(parts) < len(folders):
        other = next(folder for folder in folders if folder not in parts)
        raise DataError(f"input = {parts[0]} is a part and {other} is a folder by itself; merge the parts first")
    result = Output(output)
    if (result.folder / PART).exists():
        raise DataError(f"output = {output} is a part of a preparation; name another folder")
    if any(folder.resolve() == result.folder.resolve() for folder in folders):
        raise DataError(
            f"output = {output} is one of the inputs, and finished; name another folder, or leave it as it is "
            "(launcher/data.py pack packs it)"
        )
    joining = _Parts(parts, memory, workers) if parts else _Folders(folders, tell)
    ahead.check(joining.tokenizer, folders[0] / TOKENIZER)
    finished = joining.finished(result)
    if finished is not None and result.is_tidy and ahead.is_made(result.folder):
        return finished
    with result.locked():
        manifest = joining.finished(result)  # by whoever had the lock
        if manifest is None:
            command = typed_command("launcher/data.py merge", list(map(printable, inputs)), output=printable(output))
            result.begin(joining.fingerprint, command)
            manifest = joining.run(result)
        result.close()
        ahead.make(result.folder, workers, tell)
    return manifest


def _folders(inputs: Sequence[str], output: Path) -> list[Path]:
    found: list[Path] = []
    for given in map(Path, inputs):
        # An output that is finished may be so by the merge of its own parts, which a kill has kept from tidying up.
        if (given / PARTS).is_dir() and (given.resolve() == output.resolve() or not (given / MANIFEST).exists()):
            found += sorted(path for path in (given / PARTS).iterdir() if path.is_dir())
        elif any((given / name).exists() for name in (PART, MANIFEST, WORK)):
            found.append(given)
        else:
            raise DataError(f"input = {given} is no folder that launcher/prepare_data.py wrote; name one")
    for folder in found:
        if not (folder / PART).exists() and not (folder / MANIFEST).exists():
            raise DataError(f"input = {folder} {unfinished(folder) or 'is no part and no finished folder; remove it'}")
    seen: set[Path] = set()
    for folder in found:
        if folder.resolve() in seen:
            raise DataError(f"input = {folder} is named twice; leave one out")
        seen.add(folder.resolve())
    return found


class _Joining:
    """Folders that fit together, and what becomes of them."""

    tokenizer: Tokenizer
    fingerprint: str  # of what the joined folder holds

    def finished(self, output: Output) -> Manifest | None:
        """Return what an earlier merge of the same has finished. Raises DataError: the output is something else."""
        if not (output.folder / MANIFEST).exists():
            return None
        manifest = read_manifest(output.folder)
        if manifest.options.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"output = {output.folder} is finished already, of something else; name another folder, or remove its "
                f"{MANIFEST}"
            )
        return manifest

    def run(self, output: Output) -> Manifest:
        """Join them."""
        raise NotImplementedError


# -- parts -------------------------------------------------------------------------------------------------------------


class _Parts(_Joining):
    def __init__(self, folders: list[Path], memory: int, workers: int):
        self._folders, self._memory, self._workers = folders, memory, workers
        self._parts = [_read_part(folder) for folder in folders]
        _check_parts(folders, self._parts)
        self.fingerprint = self._parts[0].digest
        self.tokenizer = Tokenizer.load(folders[0] / TOKENIZER)

    def run(self, output: Output) -> Manifest:
        """Finish the tasks of all parts together."""
        folders, first = self._folders, self._parts[0]
        tasks = [
            (folder / WORK / "shards", task)
            for folder, part in zip(folders, self._parts)
            for task in _tasks_of(folder, part)
        ]
        tasks.sort(key=lambda each: each[1].key)
        finishing = Finishing(
            output.folder,
            output.work,
            first.sources,
            first.vocab_size,
            float(first.options["held_out"]),
            bool(first.options["deduplicate"]),
            self._memory,
            moves=False,
            workers=self._workers,
        )
        done, shards, examples = finishing.run(tasks)
        for source in done:
            link_or_copy(folders[0] / source.name / FILES, output.folder / source.name / FILES)
        examples = [*examples, *first.skipped][:KEPT_EXAMPLES]
        self.tokenizer.save(output.folder / TOKENIZER)
        return write_manifest(
            output.folder, done, shards, self.tokenizer, {**first.options, "fingerprint": self.fingerprint}, examples
        )


def _check_parts(folders: list[Path], parts: list[Part]) -> None:
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


def _tasks_of(folder: Path, part: Part) -> list[Done]:
    """Return the tasks of a part. Raises: DataError: its journal does not have all that the part has counted."""
    tasks = Output(folder).done()
    found = [source.model_copy(deep=True) for source in part.sources]
    for task in tasks:
        add_counts(found[task.key[0]], task.counts)
    if found != part.counted:
        counts = [sum(source.documents for source in sources) for sources in (found, part.counted)]
        raise DataError(
            f"input = {folder} has {counts[0]:,} of its {counts[1]:,} documents in {WORK}, which must be copied with "
            "it; restore that, or prepare the part again"
        )
    return tasks


def _read_part(folder: Path) -> Part:
    try:
        return Part.model_validate_json((folder / PART).read_text())
    except (ValidationError, ValueError, OSError) as error:
        raise DataError(
            f"{folder / PART} cannot be read ({str(error).splitlines()[0]}); prepare the part again"
        ) from None


# -- folders -----------------------------------------------------------------------------------------------------------


class _Folders(_Joining):
    def __init__(self, folders: list[Path], tell: Callable[[str], None]):
        self._folders, self._tell = folders, tell
        self._manifests = [read_manifest(folder) for folder in folders]
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
