"""Tasks that are done -> a folder of shards: without copies, with something held out, numbered, and with its table.

Nothing is kept of a finishing that was killed: done again it decides the same, and what it moved is in its place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.prepare.duplicates import mark_duplicates
from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Counts, Done, hash_file, read_hashes
from dsv3_megatron.data.raw.inputs import InputFile
from dsv3_megatron.data.source.origins import FILES
from dsv3_megatron.data.source.shard_table import fault_of_file
from dsv3_megatron.data.source.shards import (
    ORIGIN,
    SPLITS,
    Shard,
    ShardWriter,
    Source,
    Split,
    file_sha256,
    read_lengths,
    token_dtype,
)
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.handed import open_regular
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.processes import in_processes
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_LINKS_AT_ONCE = 16


@dataclass
class _Entry:
    """A shard of a task on its way to its place."""

    work: Path
    source: int
    split: Split
    shard: Shard
    kept: np.ndarray | None = None  # [documents] bool; None = all

    @property
    def documents(self) -> int:
        return self.shard.documents if self.kept is None else int(self.kept.sum())

    def drop(self, documents: np.ndarray | list[int]) -> None:
        self.kept = np.ones(self.shard.documents, dtype=bool) if self.kept is None else self.kept
        self.kept[documents] = False


@dataclass(frozen=True)
class Finishing:
    """What a folder is made of.

    Args:
        folder: where the shards go. scratch: for files that are removed again.
        sources: as they are before anything is counted.
        moves: whether the shards of tasks may be moved; else they are linked, or copied where they cannot be.
    """

    folder: Path
    scratch: Path
    sources: list[Source]
    vocab_size: int
    held_out: float
    deduplicate: bool
    memory: int
    moves: bool
    workers: int

    def run(self, tasks: Sequence[tuple[Path, Done]]) -> tuple[list[Source], list[Shard], list[str]]:
        """Put shards in their places.

        Args:
            tasks: with the folder of work that each was done in, in the order of their keys.
        Returns: (sources with their counts, shards, examples of what could not be read).
        Raises: DataError: there is no document at all, or an input that has a weight gave none.
        """
        entries = [
            _Entry(work, done.key[0], split, shard)
            for work, done in tasks
            for split in SPLITS
            for shard in done.shards[split]
        ]
        sources = [source.model_copy(deep=True) for source in self.sources]
        for _, done in tasks:
            add_counts(sources[done.key[0]], done.counts)
        examples = [line for _, done in tasks for line in done.examples][:KEPT_EXAMPLES]
        check_documents(sources, examples)
        if self.deduplicate:
            self._drop_copies(entries, sources)
        chosen = self._held_out_of_small(tasks, entries, sources) if self.held_out else {}
        return sources, self._place(entries, chosen), examples

    def _drop_copies(self, entries: list[_Entry], sources: list[Source]) -> None:
        counts = [entry.shard.documents for entry in entries]
        files = [hash_file(entry.work, entry.shard) for entry in entries]
        result = self.scratch / "duplicates.npy"
        mark_duplicates(files, counts, self.memory, self.scratch / "duplicates", result)
        marked = np.load(result, mmap_mode="r")
        at = 0
        for entry, file in zip(entries, files):
            copies = np.flatnonzero(marked[at : at + entry.shard.documents])
            at += entry.shard.documents
            if len(copies):
                entry.drop(copies)
                source = sources[entry.source]
                source.documents -= len(copies)
                source.duplicates += len(copies)
                source.tokens -= int(read_lengths(entry.work, entry.shard, self.vocab_size)[copies].sum())
                source.text_bytes -= int(read_hashes(file, entry.shard.documents)["text_bytes"][copies].sum())

    def _held_out_of_small(
        self, tasks: Sequence[tuple[Path, Done]], entries: list[_Entry], sources: list[Source]
    ) -> dict[int, list[tuple[_Entry, list[int]]]]:
        """Choose what is held out of sources whose share is less than a document: that of the least hash, all copies
        of it. Returns, by source, shards and documents of them, which are taken out of the training shards."""
        found: dict[int, list[tuple[_Entry, list[int]]]] = {}
        by_name = {(entry.work, entry.shard.name): entry for entry in entries}
        for number, source in enumerate(sources):
            if any(e.documents for e in entries if e.source == number and e.split == "held_out"):
                continue
            mine = [(work, done) for work, done in tasks if done.key[0] == number and done.least is not None]
            least = min((done.least.hash for _, done in mine if done.least), default=None)
            chosen: dict[int, tuple[_Entry, list[int]]] = {}
            for work, done in mine:
                if done.least is None or done.least.hash != least:
                    continue
                for shard, document in done.least.places:
                    entry = by_name[work, done.shards["train"][shard].name]
                    if entry.kept is None or entry.kept[document]:
                        chosen.setdefault(id(entry), (entry, []))[1].append(document)
            if sum(len(documents) for _, documents in chosen.values()) < source.documents:
                found[number] = list(chosen.values())
                for entry, documents in found[number]:
                    entry.drop(documents)
        return found

    def _place(self, entries: list[_Entry], chosen: dict[int, list[tuple[_Entry, list[int]]]]) -> list[Shard]:
        """Give every shard its number and put it there; return the shards."""
        counts: dict[tuple[int, Split], int] = {}

        def name_of(source: int, split: Split) -> str:
            number = counts.setdefault((source, split), 0)
            counts[source, split] += 1
            return f"{self.sources[source].name}/{split}_{number:05d}"

        whole: list[tuple[Path, Shard, str]] = []
        rewritten: list[_Rewrite] = []
        for entry in entries:
            if not entry.documents:
                continue
            name = name_of(entry.source, entry.split)
            if entry.kept is None:
                whole.append((entry.work, entry.shard, name))
            else:
                kept = [(str(entry.work), entry.shard, np.flatnonzero(entry.kept))]
                rewritten.append(_Rewrite(str(self.folder), name, self.vocab_size, kept))
        for source, places in chosen.items():
            kept = [(str(entry.work), entry.shard, np.asarray(documents)) for entry, documents in places]
            rewritten.append(_Rewrite(str(self.folder), name_of(source, "held_out"), self.vocab_size, kept))
        for each in self.sources:
            (self.folder / each.name).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_LINKS_AT_ONCE) as pool:
            found = list(pool.map(lambda each: put(each[0], each[1], each[2], self.folder, moves=self.moves), whole))
        return found + in_processes(_rewrite, rewritten, self.workers)


def add_counts(source: Source, counts: Counts) -> None:
    """Add what became of some documents to a source."""
    for name, count in counts.model_dump().items():
        setattr(source, name, getattr(source, name) + count)


def check_documents(sources: Sequence[Source], examples: Sequence[str]) -> None:
    """Raise DataError where there are no documents, or where an input with a weight gave none."""
    told = f": {examples[0]}" if examples else ""
    if not any(source.documents for source in sources):
        names = ", ".join(source.input for source in sources)
        raise DataError(f"input = {names} holds no readable document{told}; check the input and field")
    for source in sources:
        if source.weight is not None and not source.documents:
            raise DataError(
                f"input = {source.input} has the weight {source.weight:g} and gave no document; "
                "leave it and its weight out, or check field"
            )


def write_files(folder: Path, source: str, files: Sequence[InputFile]) -> None:
    """Write the list of a source's input files; their numbers are its lines from 0."""
    lines = [json.dumps({"path": file.name, "bytes": file.size}, ensure_ascii=False) + "\n" for file in files]
    (folder / source).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / source / FILES, "".join(lines))


def put(work: Path, shard: Shard, name: str, folder: Path, *, moves: bool) -> Shard:
    """Put the files of a shard in their place under ``name``; return it as it is called there.

    Raises: DataError: one is missing, or is not what its folder says.
    """
    for suffix in shard.suffixes:
        old, new = work / f"{shard.name}.{suffix}", folder / f"{name}.{suffix}"
        if not moves:
            if fault := fault_of_file(work, f"{shard.name}.{suffix}", _size_of(shard, suffix)):
                raise DataError(f"{fault}; restore it, or prepare its folder again")
            link_or_copy(old, new)
        elif old.exists():
            os.replace(old, new)
        elif not new.exists():  # else moved by a run that was killed after
            raise _missing(old)
    return shard.model_copy(update={"name": name})


def link_or_copy(old: Path, new: Path) -> None:
    """Make ``new`` the same file as ``old``, or a copy where the file system has no such links.

    Raises: DataError: ``old`` is missing.
    """
    new.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(old), new)
    except FileNotFoundError:
        raise _missing(old) from None
    except OSError:  # another file system, or one without hard links
        partial = new.with_name(f"{new.name}.partial")
        with open_regular(old) as source, new_file(partial) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(partial, new)


def _size_of(shard: Shard, suffix: str) -> int | None:
    """Return the size of a shard's file, where that is known."""
    return shard.bytes.get(suffix) if suffix in ("bin", "idx") else None  # type: ignore[call-overload,no-any-return]


def _missing(file: Path) -> DataError:
    return DataError(f"{file} is missing; restore it, or prepare its folder again")


@dataclass(frozen=True)
class _Rewrite:
    """A shard to be written anew from documents of others: folder, shard and numbers [documents] of each."""

    folder: str
    name: str
    vocab_size: int
    kept: list[tuple[str, Shard, np.ndarray]]


def _opened(folder: Path, shard: Shard, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, lengths and origins of a shard, which is compared with its checksums: what is written of it gets
    new ones. Raises: DataError: a file is not what it was."""
    for suffix, digest in (("bin", shard.sha256["bin"]), ("origin.npy", shard.origin_sha256)):
        path = folder / f"{shard.name}.{suffix}"
        if fault := fault_of_file(folder, f"{shard.name}.{suffix}", _size_of(shard, suffix)):
            raise DataError(f"{fault}; restore it, or prepare its folder again")
        if file_sha256(path) != digest:
            raise DataError(f"{path} has another SHA-256 than when it was written; restore it, or prepare its folder "
                            "again")  # fmt: skip
    lengths = read_lengths(folder, shard, vocab_size, bytes.fromhex(shard.sha256["idx"]))
    dtype = token_dtype(vocab_size)
    if shard.bytes["bin"] != shard.tokens * dtype.itemsize:
        raise DataError(f"{folder / shard.name} has tokens of another size; prepare its folder again")
    with open_regular(folder / f"{shard.name}.bin") as file:
        tokens = np.memmap(file, dtype, "r") if shard.tokens else np.zeros(0, dtype)
    try:
        origins = open_npy(folder / f"{shard.name}.origin.npy", ORIGIN, shard.documents)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / shard.name}.origin.npy cannot be read ({why_unread(error)}); restore it") from None
    return tokens, lengths, origins


def _rewrite(given: _Rewrite) -> Shard:
    writer = ShardWriter(Path(given.folder), given.name, given.vocab_size)
    for work, shard, documents in given.kept:
        tokens, lengths, origins = _opened(Path(work), shard, given.vocab_size)
        ends = np.cumsum(lengths)
        begins = np.concatenate([[0], ends[:-1]])
        for document in documents:
            writer.add([tokens[begins[document] : ends[document]]], origins[document : document + 1])
    return writer.commit()
