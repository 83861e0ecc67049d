"""Raw documents -> token shards, on one node or as one part of many.

Whatever was interrupted goes on: a task counts once its shards are whole and named in the journal, and the plan of
tasks depends on the inputs alone. So the shards do not depend on the number of workers or nodes, on their speed or on
how often the work was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dsv3_megatron.data.begun import PART, folder_of_part, typed_command
from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Done, Encoding, check_limits
from dsv3_megatron.data.prepare.farm import encode_all
from dsv3_megatron.data.prepare.finish import Finishing, add_counts, write_files
from dsv3_megatron.data.prepare.output import Output, Part, read_part
from dsv3_megatron.data.prepare.pack import PackAhead
from dsv3_megatron.data.prepare.plan import share_of, units_of
from dsv3_megatron.data.raw.inputs import check_distinct, check_outside, check_unchanged, files_of, printable
from dsv3_megatron.data.raw.lines import DOCUMENT_BYTES
from dsv3_megatron.data.source.shard_table import write_table
from dsv3_megatron.data.source.shards import MANIFEST, TOKENIZER, Manifest, Shard, Source, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_json
from dsv3_megatron.run.handed import real_path
from parallel.errors import DataError
from parallel.units import GIB

Progress = Callable[[int, int, int], None]  # bytes of input done, of how many, tokens so far


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the content of the shards, and below it how they are made."""

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
    part: tuple[int, int] | None = None  # number from 1, of how many
    max_bad: int = 1000
    max_torn: int = 64 << 20  # bytes on disk
    deduplicate_memory: int = GIB
    document_bytes: int = DOCUMENT_BYTES

    @property
    def kept(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        names = ["field", "held_out", "deduplicate", "split_share", "seed", "shard_tokens", "weights"]
        if self.document_bytes != DOCUMENT_BYTES:  # else what earlier versions began could not be finished
            names.append("document_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def folder(self) -> Path:
        """Where the shards go: ``output``, or a folder of the part's own in it."""
        if self.part is None:
            return Path(self.output)
        return folder_of_part(self.output, *self.part)

    @property
    def command(self) -> str:
        """How the command is typed that makes these shards."""
        given = {name: getattr(self, name) for name in ("output", "tokenizer", "weights", *self._defaults)}
        keys = {name: value for name, value in given.items() if value != self._defaults.get(name)}
        joins = {"weights": ",", "part": "/"}
        shown = {name: joins[name].join(map(str, value)) if name in joins else value for name, value in keys.items()}
        return typed_command("launcher/prepare_data.py", list(map(printable, self.inputs)), **shown)

    @property
    def _defaults(self) -> dict[str, Any]:
        return {each.name: each.default for each in fields(self) if each.default is not MISSING}


def prepare(
    options: PrepareOptions,
    *,
    workers: int,
    ahead: PackAhead | None = None,
    progress: Progress = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Manifest | Part:
    """Write the shards of ``options`` and return their manifest, or of a part what it did; goes on where an earlier
    call was stopped.

    Args:
        ahead: what to pack the finished shards for.
        tell: gets what a person should know of the tokenizer, line by line, before the work begins.
    Raises: DataError: an input is missing or gives nothing, the output holds something else, or too much could not be
    read; documents cannot be packed as ``ahead`` says. RunInUseError: another process works in the output.
    """
    ahead = ahead or PackAhead()
    if options.part is not None and ahead.lengths:
        part, parts = options.part
        raise DataError(
            f"part = {part}/{parts} cannot be packed into sequences before it is merged; leave sequence_length out "
            "here, and give it to launcher/data.py merge"
        )
    preparation = _Preparation(options, workers, ahead, progress, tell)
    for line in (*preparation.tokenizer.notes, preparation.tokenizer.names.told()):
        tell(line)
    return preparation.run()


class _Preparation:
    def __init__(
        self,
        options: PrepareOptions,
        workers: int,
        ahead: PackAhead,
        progress: Progress,
        tell: Callable[[str], None],
    ):
        self.options, self.workers, self.ahead, self.progress, self.tell = options, workers, ahead, progress, tell
        self.output = Output(options.folder)
        self.folder = self.output.folder
        check_outside(options.output, options.inputs)
        self.inputs = [files_of(name) for name in options.inputs]
        check_distinct(options.inputs, self.inputs)
        self.units = units_of(self.inputs, options.shard_tokens)
        self.tokenizer = Tokenizer.load(options.tokenizer)
        ahead.check(self.tokenizer, printable(options.tokenizer))

    def run(self) -> Manifest | Part:
        digest, fingerprint = self._digests()
        finished = self._finished(digest, fingerprint)
        if isinstance(finished, Part):
            return finished
        if finished is not None and self.output.is_tidy and self.ahead.is_made(self.folder):
            return finished
        with self.output.locked():
            made = self._finished(digest, fingerprint)  # by whoever had the lock
            if made is None:
                done = self.output.begin(f"{digest} {fingerprint}", self.options.command)
                self._encode(done)
                check_unchanged(file for found in self.inputs for file in found.files)  # since a task has read them
                done.sort(key=lambda task: task.key)
                made = self._whole(done, digest, fingerprint) if self.options.part is None else self._part(done, digest)
            if isinstance(made, Manifest):
                self.output.close()
                self.ahead.make(self.folder, self.workers, self.tell)
            return made

    def _finished(self, digest: str, fingerprint: str) -> Manifest | Part | None:
        """Return what an earlier run of the same has finished. Raises DataError where it was another."""
        try:
            there = (self.folder / MANIFEST).exists()
        except PermissionError as error:
            raise DataError(f"output = {self.folder} may not be read ({error.strerror}); name another") from None
        if there:
            manifest = read_manifest(self.folder)
            if manifest.options.get("fingerprint") != fingerprint:
                raise self.output.other()
            return manifest
        if (self.folder / PART).exists():
            part = read_part(self.folder)
            if part.digest != digest:
                raise self.output.other()
            return part
        return None

    def _digests(self) -> tuple[str, str]:
        """Return digests of what decides the shards: as every node sees it, and with the times of files on this one.

        The first has the plan in it, too: tasks of another version, cut otherwise, must not be joined with these.
        """
        names = [printable(given) for given in self.options.inputs]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.options.kept, self.tokenizer.sha256, _source_names(tuple(names))]).encode())
        times = hashlib.blake2b(json.dumps([names, self.options.part]).encode(), digest_size=16)
        for file in (file for found in self.inputs for file in found.files):
            digest.update(f"{file.name}:{file.size}\n".encode())
            times.update(f"{file.mtime_ns}\n".encode())
        whole = hashlib.blake2b(digest.digest() + times.digest(), digest_size=16)
        digest.update(json.dumps([(unit.source, len(unit.files), unit.piece_bytes) for unit in self.units]).encode())
        return digest.hexdigest(), whole.hexdigest()

    def _sources(self) -> list[Source]:
        weights = self.options.weights or (None,) * len(self.inputs)
        names = [printable(given) for given in self.options.inputs]
        return [
            Source(
                name=name, input=given, weight=weight, files=len(found.files), ignored_files=found.ignored,
                skipped=len(found.skipped),
            )
            for name, given, weight, found in zip(_source_names(tuple(names)), names, weights, self.inputs)
        ]  # fmt: skip

    def _encode(self, done: list[Done]) -> None:
        options = self.options
        units = self.units if options.part is None else share_of(self.units, *options.part)
        total = sum(unit.size for unit in units)  # of a file that several parts read, all of it
        before = sum(task.counts.tokens for task in done)
        encoding = Encoding(
            work=str(self.output.work / "shards"),
            tokenizer=self.tokenizer,
            text_field=options.field,
            held_out=options.held_out,
            deduplicate=options.deduplicate,
            split_share=options.split_share,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            max_bad=options.max_bad,
            max_torn=options.max_torn,
            document_bytes=options.document_bytes,
            threads=1,
        )

        lost = [sum(task.counts.bad for task in done), sum(task.counts.torn_bytes for task in done)]

        def check() -> None:
            check_limits(lost[0], lost[1], options.max_bad, options.max_torn, lambda: _first_example(done))

        check()  # the task that went beyond is in the journal, and would pass when the command is run again

        def keep(task: Done) -> None:
            self.output.keep(task)
            lost[0] += task.counts.bad
            lost[1] += task.counts.torn_bytes
            check()

        encode_all(
            units, done, encoding, workers=self.workers, keep=keep,
            look=lambda read, tokens: self.progress(min(read, total), total, before + tokens),
        )  # fmt: skip

    def _part(self, done: list[Done], digest: str) -> Part:
        assert self.options.part is not None
        self._write_names()
        counted = self._sources()
        for task in done:
            add_counts(counted[task.key[0]], task.counts)
        part = Part(
            part=self.options.part[0],
            parts=self.options.part[1],
            digest=digest,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            options=self.options.kept,
            sources=self._sources(),
            counted=counted,
            bad_examples=self._examples([line for task in done for line in task.examples]),
            skipped=self._examples([]),
        )
        write_json(self.folder / PART, part.model_dump(mode="json"))
        return part

    def _whole(self, done: list[Done], digest: str, fingerprint: str) -> Manifest:
        work = self.output.work
        finishing = Finishing(
            self.folder, work, self._sources(), self.tokenizer.vocab_size, self.options.held_out,
            self.options.deduplicate, self.options.deduplicate_memory, moves=True, workers=self.workers,
        )  # fmt: skip
        try:
            sources, shards, examples = finishing.run([(work / "shards", task) for task in done])
        except DataError:
            if not any(task.counts.documents for task in done):
                self.output.forget()
            raise
        self._write_names()
        return write_manifest(
            self.folder, sources, shards, self.tokenizer, {**self.options.kept, "fingerprint": fingerprint},
            self._examples(examples),
        )  # fmt: skip

    def _write_names(self) -> None:
        """Write what the shards need beside them: the tokenizer, and the input files that documents come from."""
        self.tokenizer.save(self.folder / TOKENIZER)
        for source, found in zip(self._sources(), self.inputs):
            write_files(self.folder, source.name, found.files)

    def _examples(self, found: list[str]) -> list[str]:
        skipped = [line for each in self.inputs for line in each.skipped]
        return [*found, *skipped][:KEPT_EXAMPLES]


def write_manifest(
    folder: Path,
    sources: list[Source],
    shards: list[Shard],
    tokenizer: Tokenizer,
    options: dict[str, Any],
    examples: list[str],
) -> Manifest:
    """Write the table of shards, then the manifest, after which the folder counts as whole; return the manifest."""
    counted, table_sha256 = write_table(folder, sources, shards)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        options=options,
        sources=counted,
        bad_examples=examples,
        table_sha256=table_sha256,
        has_sums=all(shard.has_sums for shard in shards),
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest


def _first_example(tasks: list[Done]) -> str:
    return min((task for task in tasks if task.examples), key=lambda task: task.key).examples[0]


def _source_names(inputs: tuple[str, ...]) -> list[str]:
    """Return a folder name for each input: its own, numbered so that no two are alike."""
    names = []
    for number, given in enumerate(inputs):
        stem = real_path(Path(given)).name.split(".")[0] or "input"
        names.append(f"{number:02d}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in stem)}")
    return names
