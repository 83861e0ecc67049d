"""The parts of one preparation, joined: their tasks are finished together, so copies are found across them."""

from __future__ import annotations

from pathlib import Path

from dsv3_megatron.data.begun import WORK, first_of
from dsv3_megatron.data.prepare.encode import KEPT_EXAMPLES, Done
from dsv3_megatron.data.prepare.finish import Finishing, add_counts
from dsv3_megatron.data.prepare.output import Output, Part, held_out_of, read_part
from dsv3_megatron.data.prepare.shard import write_manifest
from dsv3_megatron.data.source.origins import FILES, read_list
from dsv3_megatron.data.source.shards import TOKENIZER, Manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_atomically
from parallel.errors import DataError


class PartsJoin:
    """The parts of one preparation: what one process without parts makes of it, to the byte."""

    def __init__(self, folders: list[Path], memory: int, workers: int):
        """Raises: DataError: they are not all of one preparation, each once."""
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
            held_out_of(first.options, folders[0]),
            first.options.get("deduplicate") is True,
            self._memory,
            moves=False,
            workers=self._workers,
        )
        done, shards, examples = finishing.run(tasks)
        for source in done:
            write_atomically(output.folder / source.name / FILES, read_list(folders[0], source.name))
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
        raise DataError(
            f"part {first_of(missing)} of {first.parts} is missing; prepare it with part={missing[0]}/{first.parts}"
        )


def _tasks_of(folder: Path, part: Part) -> list[Done]:
    """Return the tasks of a part. Raises: DataError: its journal does not have all that the part has counted."""
    tasks = Output(folder).done()
    if wrong := [task.key for task in tasks if task.key[0] >= len(part.sources)]:
        raise DataError(
            f"input = {folder} has a task of source {wrong[0][0]}, which is not in it; prepare the part again"
        )
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
    part = read_part(folder)
    held_out_of(part.options, folder)
    return part
