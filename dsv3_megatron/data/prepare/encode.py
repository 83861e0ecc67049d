"""One task in a worker: read, encode and write its shards. Nobody else touches them until the task is done."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, model_validator

from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.prepare.plan import Key, Task
from dsv3_megatron.data.raw.documents import Document, Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import check_unchanged
from dsv3_megatron.data.source.hashing import key_of
from dsv3_megatron.data.source.shards import SPLITS, Count, Shard, ShardWriter, Split
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.made import new_file
from dsv3_megatron.run.processes import end_with_parent
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

BATCH_BYTES = 1 << 20  # of text that is encoded at a time
KEPT_EXAMPLES = 20
HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("text_bytes", "<u8")])  # of a document's text


class Counts(BaseModel):
    """What became of the documents of a task; the names are those of a source's."""

    documents: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    duplicates: Count = 0
    empty: Count = 0
    bad: Count = 0
    bad_bytes: Count = 0
    torn: Count = 0
    torn_bytes: Count = 0
    ignored_files: Count = 0


class Least(BaseModel):
    """The training documents of a task whose text has the least hash: what is held out where nothing else is."""

    hash: str
    places: list[tuple[Count, Count]]  # shard of the task, document


class Done(BaseModel):
    """A task that is done, as the journal keeps it. ``shards``: named in the folder of work, in order."""

    key: tuple[Count, Count, Count]
    ended: bool
    disk: Count
    place: tuple[Count, Count, Count]
    counts: Counts
    examples: list[str]
    shards: Annotated[dict[Split, list[Shard]], Field(min_length=len(SPLITS))]
    least: Least | None

    @model_validator(mode="after")
    def _least_is_its_own(self) -> Done:
        train = self.shards["train"]
        for shard, document in self.least.places if self.least else ():
            if shard >= len(train) or document >= train[shard].documents:
                raise ValueError(f"least names document {document} of shard {shard}, which the task does not have")
        return self


@dataclass(frozen=True)
class Encoding:
    """What every task needs to know."""

    work: str  # folder for the shards, before their numbers are known
    tokenizer: Tokenizer
    text_field: str
    held_out: float
    deduplicate: bool
    split_share: float
    seed: int
    shard_tokens: int
    max_bad: int
    max_torn: int
    document_bytes: int
    threads: int  # that encode in this process


def work_name(key: Key, split: str, number: int) -> str:
    """Return the name of a task's shard in the folder of work."""
    source, unit, piece = key
    return f"{source:04d}/{unit:07d}_{piece:05d}_{split}_{number:03d}"


# -- the process -------------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


class StoppedError(Exception):
    """The work ends, and this task with it."""


def start_worker(encoding: Encoding, stopping: Any, read: Any, tokens: Any) -> None:
    """Make this process a worker. ``stopping``: an event; ``read`` and ``tokens``: shared counters of progress."""
    os.environ["RAYON_NUM_THREADS"] = str(encoding.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if encoding.threads > 1 else "false"
    _worker.update(encoding=encoding, stopping=stopping, read=read, tokens=tokens)
    end_with_parent()


def do_task(task: Task) -> Done:
    """Do a task. Raises: DataError: more than ``max_bad`` of it cannot be read. StoppedError."""
    return _TaskWork(task, _worker["encoding"]).run()


# -- the task ----------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    documents: list[Document] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    empty: int = 0
    foreign: int = 0
    read: int = 0  # bytes on disk


class _TaskWork:
    def __init__(self, task: Task, encoding: Encoding):
        self.task, self.encoding = task, encoding
        self.counts = Counts()
        self.examples: list[str] = []
        self.shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
        self.writers: dict[Split, ShardWriter] = {}
        self.hashes: dict[Split, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
        self.seen: set[bytes] = set()
        self.least: tuple[bytes, list[tuple[int, int]]] = (b"", [])
        self.last: SpanReader | None = None

    def run(self) -> Done:
        batches = _batches(self.task.spans, self.encoding, self)
        with ThreadPoolExecutor(1) as ahead:  # the next batch is read while this one is encoded
            upcoming = ahead.submit(next, batches, None)
            while (batch := upcoming.result()) is not None:
                if _worker["stopping"].is_set():
                    raise StoppedError
                upcoming = ahead.submit(next, batches, None)
                self._take(batch)
        check_unchanged(span.file for span in self.task.spans)  # before what was read of them counts
        for split in SPLITS:
            self._commit(split)
        assert self.last is not None
        place = self.last.place
        return Done(
            key=self.task.key,
            ended=self.last.ended,
            disk=self.last.disk,
            place=(place.disk, place.content, place.lines),
            counts=self.counts,
            examples=self.examples,
            shards=self.shards,
            least=Least(hash=self.least[0].hex(), places=self.least[1]) if self.least[1] else None,
        )

    def _take(self, batch: _Batch) -> None:
        """Count a batch, encode its documents, and write each to the split that its hash says."""
        self._count(batch)
        kept = []
        for document in batch.documents:
            digest = hashlib.blake2b(document.raw, digest_size=16).digest()
            if self.encoding.deduplicate:
                if digest in self.seen:
                    self.counts.duplicates += 1
                    continue
                self.seen.add(digest)
            kept.append((document, digest))
        tokenizer, share = self.encoding.tokenizer, self.encoding.split_share
        before = self.counts.tokens
        for (document, digest), ids in zip(kept, tokenizer.encode_documents([document.text for document, _ in kept])):
            if share:
                ids = tokenizer.split_joined(ids, share, key_of(self.encoding.seed, digest.hex()))
            self._write(document, digest, ids)
        with _worker["read"].get_lock():
            _worker["read"].value += batch.read
            _worker["tokens"].value += self.counts.tokens - before

    def _count(self, batch: _Batch) -> None:
        counts, encoding = self.counts, self.encoding
        counts.empty += batch.empty
        counts.ignored_files += batch.foreign
        for lost in batch.lost:
            counts.bad += lost.rows
            counts.bad_bytes += lost.size
            counts.torn += bool(lost.disk)
            counts.torn_bytes += lost.disk
        self.examples += [str(lost) for lost in batch.lost][: KEPT_EXAMPLES - len(self.examples)]
        check_limits(counts.bad, counts.torn_bytes, encoding.max_bad, encoding.max_torn, lambda: self.examples[0])

    def _write(self, document: Document, digest: bytes, ids: np.ndarray) -> None:
        held_out = int.from_bytes(digest[:4], "big") < self.encoding.held_out * 2**32
        split: Split = "held_out" if held_out else "train"
        if split not in self.writers:
            name = work_name(self.task.key, split, len(self.shards[split]))
            self.writers[split] = ShardWriter(Path(self.encoding.work), name, self.encoding.tokenizer.vocab_size)
        writer = self.writers[split]
        if split == "train" and (not self.least[1] or digest <= self.least[0]):
            places = self.least[1] if digest == self.least[0] else []
            self.least = (digest, [*places, (len(self.shards[split]), writer.documents)])
        writer.add([ids], [(document.file, document.row)])
        if self.encoding.deduplicate:
            high, low = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:]))
            self.hashes[split].append((high, low, len(document.raw)))
        self.counts.documents += 1
        self.counts.tokens += len(ids)
        self.counts.text_bytes += len(document.raw)
        if writer.tokens >= self.encoding.shard_tokens:
            self._commit(split)

    def _commit(self, split: Split) -> None:
        if (writer := self.writers.pop(split, None)) is None:
            return
        shard = writer.commit()
        if self.encoding.deduplicate:
            with new_file(hash_file(self.encoding.work, shard)) as file:
                np.save(file, np.asarray(self.hashes[split], dtype=HASH))
            self.hashes[split] = []
        self.shards[split].append(shard)


def hash_file(work: str | Path, shard: Shard) -> Path:
    """Return where the hashes [documents] of a shard's texts are."""
    return Path(work) / f"{shard.name}.hash.npy"


def read_hashes(path: Path, documents: int) -> np.ndarray:
    """Return the hashes [documents] of a shard's texts. Raises: DataError: they are missing or damaged."""
    try:
        return open_npy(path, HASH, documents)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({why_unread(error)}); prepare the part again") from None


def check_limits(bad: int, torn_bytes: int, max_bad: int, max_torn: int, example: Callable[[], str]) -> None:
    """Raise DataError where more cannot be read than may be."""
    if bad > max_bad:
        raise DataError(
            f"more than max_bad = {max_bad} documents could not be read, such as {example()}; "
            "fix the input, or raise max_bad"
        )
    if torn_bytes > max_torn:
        raise DataError(
            f"{torn_bytes:,} bytes of damaged files could not be read, more than max_torn = {max_torn:,}, such as "
            f"{example()}; restore the file, or raise max_torn"
        )


def _batches(spans: tuple[Span, ...], encoding: Encoding, work: _TaskWork) -> Iterator[_Batch]:
    batch, size = _Batch(), 0
    for span in spans:
        # the lines that this worker read last: of a large file, it may have to read on from there
        reader = work.last = SpanReader(span, encoding.text_field, _worker.get("lines"), encoding.document_bytes)
        counted: int | None = None if span.first else 0  # what lies before the span is no progress
        for found in reader:
            counted = reader.disk if counted is None else counted
            if isinstance(found, Lost):
                batch.lost.append(found)
            elif found.raw:
                batch.documents.append(found)
                size += len(found.raw)
            else:
                batch.empty += 1
            if size >= BATCH_BYTES or len(batch.lost) >= KEPT_EXAMPLES:
                batch.read += reader.disk - counted
                counted = reader.disk
                yield batch
                batch, size = _Batch(), 0
        _worker["lines"] = reader.lines
        batch.read += reader.disk - (reader.disk if counted is None else counted)
        batch.foreign += reader.foreign
    yield batch
