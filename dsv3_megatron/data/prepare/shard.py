"""Raw documents -> token shards: many workers read and encode, one process writes in order and keeps the journal.

Whatever was interrupted goes on: shards count only once they are whole and named in the journal, and the journal says
with which block of the inputs to go on. Blocks are written in their order, so the shards do not depend on the number
of workers, on their speed or on how often the run was killed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.data.prepare.documents import Bad, Block, blocks, files_of, texts
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_json
from parallel.errors import DataError

KEPT_EXAMPLES = 20


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the content of the shards."""

    inputs: tuple[str, ...]
    weights: tuple[float, ...] | None
    output: str
    tokenizer: str
    field: str = "text"
    held_out: float = 0.005
    deduplicate: bool = False
    split_share: float = 0.1
    seed: int = 1234
    shard_tokens: int = 64_000_000
    max_bad: int = 1000


@dataclass
class Encoded:
    """What a worker made of a block."""

    tokens: np.ndarray  # all documents in a row
    lengths: np.ndarray
    hashes: bytes  # 16 a document
    text_bytes: np.ndarray
    empty: int
    bad: list[Bad]
    size: int


@dataclass
class _State:
    """What the journal keeps: all that a killed run needs to go on."""

    fingerprint: str
    next_block: int = 0
    commits: int = 0
    bad_examples: list[str] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)  # shards.Source
    shards: list[Any] = field(default_factory=list)  # shards.Shard


Progress = Callable[[int, int, int], None]  # bytes of input done, of how many, tokens so far


def prepare(
    options: PrepareOptions,
    *,
    workers: int,
    progress: Progress = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Any:
    """Write the shards of ``options`` and return their manifest; goes on where an earlier call was stopped.

    ``tell``: gets what a person should know of the tokenizer, line by line, before the work begins.
    Raises: DataError: an input is missing, the output holds something else, or too much could not be read.
    """
    preparation = _Preparation(options, workers, progress)
    for line in (*preparation.tokenizer.notes, preparation.tokenizer.names.told()):
        tell(line)
    return preparation.run()


class _Preparation:
    def __init__(self, options: PrepareOptions, workers: int, progress: Progress):
        self.options, self.workers, self.progress = options, workers, progress
        self.folder = Path(options.output)
        self.journal = self.folder / ".prepare" / "journal.json"
        self.files = [files_of(name) for name in options.inputs]
        self.total = sum(p.stat().st_size for found, _ in self.files for p in found)
        self.tokenizer = Tokenizer.load(options.tokenizer)
        self.seen: set[bytes] = set()
        self.fresh: list[bytes] = []  # hashes since the last commit
        self.writers: dict[str, Any] = {}
        self.done = 0

    def run(self) -> Any:
        # megatron-core takes seconds to import: a mistake in the arguments is found before.
        from dsv3_megatron.data.source.shard_table import write_table
        from dsv3_megatron.data.source.shards import MANIFEST, TOKENIZER, Manifest, read_manifest

        self.state = self._begin()
        if (self.folder / MANIFEST).exists():
            return read_manifest(self.folder)
        self._encode_all()
        self.tokenizer.save(self.folder / TOKENIZER)
        sources, table_sha256 = write_table(self.folder, self.state.sources, self.state.shards)
        manifest = Manifest(
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            options={**self._options(), "fingerprint": self.state.fingerprint},
            sources=sources,
            bad_examples=self.state.bad_examples,
            table_sha256=table_sha256,
        )
        write_json(self.folder / MANIFEST, manifest.model_dump())
        shutil.rmtree(self.journal.parent)
        return manifest

    # -- what is kept between runs -------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        o = self.options
        kept = ("field", "held_out", "deduplicate", "split_share", "seed", "shard_tokens", "weights")
        return {name: getattr(o, name) for name in kept}

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self._options(), self.tokenizer.sha256, self.options.inputs]).encode())
        for path in (p for found, _ in self.files for p in found):
            stat = path.stat()
            digest.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _begin(self) -> _State:
        """Return where an earlier run stood, or a new beginning."""
        # megatron-core takes seconds to import: a mistake in the arguments is found before.
        from dsv3_megatron.data.source.shards import MANIFEST, Shard, Source, read_manifest

        fingerprint = self._fingerprint()
        earlier = None
        if (self.folder / MANIFEST).exists():
            earlier = read_manifest(self.folder).options.get("fingerprint")
        elif self.journal.exists():
            earlier = json.loads(self.journal.read_text())["fingerprint"]
        elif self.folder.exists() and any(self.folder.iterdir()) and not self.journal.parent.exists():
            raise DataError(f"output = {self.folder} is not empty and not of prepare_data; name another folder")
        if earlier not in (None, fingerprint):
            raise DataError(
                f"output = {self.folder} was made of other inputs, options or another tokenizer; "
                "name another folder, or remove it"
            )
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"output = {self.folder} cannot be written ({error.strerror}); name another") from None
        if self.journal.exists():
            state = _State(**json.loads(self.journal.read_text()))
            state.sources = [Source.model_validate(source) for source in state.sources]
            state.shards = [Shard.model_validate(shard) for shard in state.shards]
            for number in range(state.commits if self.options.deduplicate else 0):
                data = self._hash_file(number).read_bytes()
                self.seen.update(data[i : i + 16] for i in range(0, len(data), 16))
            return state
        weights = self.options.weights or (None,) * len(self.options.inputs)
        names = _source_names(self.options.inputs)
        sources = [
            Source(name=name, input=given, weight=weight, files=len(found), ignored_files=ignored)
            for name, given, weight, (found, ignored) in zip(names, self.options.inputs, weights, self.files)
        ]
        return _State(fingerprint, sources=sources)

    def _hash_file(self, number: int) -> Path:
        return self.journal.parent / f"hashes_{number:05d}"

    # -- the work ------------------------------------------------------------------------------------------------------

    def _encode_all(self) -> None:
        for partial in self.folder.glob("*/*.partial.*"):
            partial.unlink()  # what a killed run had not finished
        number = self.state.next_block - 1  # the last that is done
        for number, source, result in self._results():
            self._take(source, result)
            self.progress(self.done, self.total, self._tokens())
            if sum(w.tokens for w in self.writers.values()) >= self.options.shard_tokens:
                self._commit(number + 1)
            if sum(s.bad for s in self.state.sources) > self.options.max_bad:
                raise DataError(
                    f"more than max_bad = {self.options.max_bad} documents could not be read, such as "
                    f"{self.state.bad_examples[0]}; fix the input, or raise max_bad"
                )
        self._commit(number + 1)

    def _results(self) -> Iterator[tuple[int, int, Encoded]]:
        """Yield (block number, source, result) in the order of blocks. Sources never share a shard."""
        options = self.options
        # Spawned, not forked: the tokenizer's library must not be forked once it has run threads.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            self.workers, context, _start_worker, (self.tokenizer, options.field, options.split_share, options.seed)
        )
        waiting: deque[tuple[int, int, Future[Encoded]]] = deque()
        last_source = None
        try:
            for number, (source, block) in enumerate(self._blocks()):
                if number < self.state.next_block:
                    self.done += block.size
                    continue
                if last_source not in (None, source):
                    while waiting:
                        yield self._first(waiting)
                    self._commit(number)
                last_source = source
                waiting.append((number, source, pool.submit(_encode, block)))
                while len(waiting) > 2 * self.workers:
                    yield self._first(waiting)
            while waiting:
                yield self._first(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _first(waiting: deque[tuple[int, int, Future[Encoded]]]) -> tuple[int, int, Encoded]:
        number, source, future = waiting.popleft()
        return number, source, future.result()

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        for source, (found, _) in enumerate(self.files):
            for block in blocks(found):
                yield source, block

    def _take(self, index: int, result: Encoded) -> None:
        """Write a block's documents to the source's shards, each to the split that its hash says."""
        source = self.state.sources[index]
        source.bad += len(result.bad)
        source.empty += result.empty
        self.state.bad_examples += [str(bad) for bad in result.bad][: KEPT_EXAMPLES - len(self.state.bad_examples)]
        self.done += result.size
        documents = np.split(result.tokens, np.cumsum(result.lengths)[:-1]) if len(result.lengths) else []
        for number, document in enumerate(documents):
            digest = result.hashes[16 * number : 16 * number + 16]
            if self.options.deduplicate:
                if digest in self.seen:
                    source.duplicates += 1
                    continue
                self.seen.add(digest)
                self.fresh.append(digest)
            held_out = int.from_bytes(digest[:4], "big") < self.options.held_out * 2**32
            self._writer(index, "held_out" if held_out else "train").add([document])
            source.documents += 1
            source.tokens += len(document)
            source.text_bytes += int(result.text_bytes[number])

    def _writer(self, index: int, split: str) -> Any:
        # megatron-core takes seconds to import: a mistake in the arguments is found before.
        from dsv3_megatron.data.source.shards import ShardWriter

        if split not in self.writers:
            source = self.state.sources[index]
            name = f"{source.name}/{split}_{source.shards[split].shards:05d}"
            self.writers[split] = ShardWriter(self.folder, name, self.tokenizer.vocab_size)
        self.written_source = self.state.sources[index]
        return self.writers[split]

    def _commit(self, next_block: int) -> None:
        """Finish the open shards and say in the journal that everything before ``next_block`` is done."""
        for split, writer in self.writers.items():
            self.state.shards.append(writer.commit())
            self.written_source.shards[split].shards += 1
        self.writers = {}
        if self.options.deduplicate:
            self._hash_file(self.state.commits).write_bytes(b"".join(self.fresh))
            self.fresh = []
        self.state.commits += 1
        self.state.next_block = next_block
        write_json(
            self.journal,
            {
                **vars(self.state),
                **{key: [each.model_dump() for each in getattr(self.state, key)] for key in ("sources", "shards")},
            },
        )

    def _tokens(self) -> int:
        return sum(source.tokens for source in self.state.sources)


def _source_names(inputs: tuple[str, ...]) -> list[str]:
    """Return a folder name for each input: its own, numbered so that no two are alike."""
    names = []
    for number, given in enumerate(inputs):
        stem = Path(given).resolve().name.split(".")[0] or "input"
        names.append(f"{number:02d}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in stem)}")
    return names


# -- in a worker -------------------------------------------------------------------------------------------------------


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Tokenizer, text_field: str, split_share: float, seed: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    _worker.update(tokenizer=tokenizer, field=text_field, share=split_share, seed=seed)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the writing process dies, however it dies: a worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)


def _encode(block: Block) -> Encoded:
    tokenizer: Tokenizer = _worker["tokenizer"]
    found, bad = texts(block, _worker["field"])
    kept = [text for text in found if text]
    # surrogatepass: no text from here holds a surrogate, and a hash never fails
    raw = [text.encode("utf-8", "surrogatepass") for text in kept]
    hashes = [hashlib.blake2b(data, digest_size=16).digest() for data in raw]
    documents = tokenizer.encode_documents(kept)
    if _worker["share"]:
        documents = [
            tokenizer.split_joined(
                ids, _worker["share"], np.random.default_rng([_worker["seed"], int.from_bytes(digest, "big")])
            )
            for ids, digest in zip(documents, hashes)
        ]
    return Encoded(
        tokens=np.concatenate(documents) if documents else np.zeros(0, np.int32),
        lengths=np.asarray([len(ids) for ids in documents], dtype=np.int64),
        hashes=b"".join(hashes),
        text_bytes=np.asarray([len(data) for data in raw], dtype=np.int64),
        empty=len(found) - len(kept),
        bad=bad,
        size=block.size,
    )
