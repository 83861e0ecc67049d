"""The folder that shards are made in: whose it is, what was begun there, and what is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsv3_megatron.data.begun import BEGUN, PART, PARTS, WORK, command_begun
from dsv3_megatron.data.prepare.encode import Done
from dsv3_megatron.data.source.shards import MANIFEST, Count, Sources, VocabularySize
from dsv3_megatron.run.files import cut_json_lines, iterate_json_lines, read_json, write_json
from dsv3_megatron.run.handed import parse_json, read_text
from dsv3_megatron.run.lock import held
from dsv3_megatron.run.made import appended_file
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_LOCK = "lock"


class Part(BaseModel):
    """One of the parts that shards were made in, with all that merging them needs beside the tasks' own files.

    Args:
        digest: of inputs, options and tokenizer: the same for the parts of a whole.
        sources: before anything is counted.
        counted: with the counts of this part. Copies are found when parts are merged, and only then is something held
            out of small sources.
        skipped: what of the input was not read, each with the reason.
    """

    part: Count
    parts: Count
    digest: str
    tokenizer_sha256: str
    vocab_size: VocabularySize
    options: dict[str, Any]
    sources: Sources
    counted: Sources
    bad_examples: list[str]
    skipped: list[str]


def read_part(folder: Path) -> Part:
    """Return what a part says of itself. Raises: DataError: it cannot be read."""
    try:
        return Part.model_validate(parse_json(read_text(folder / PART), unique=True))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / PART} cannot be read ({why_unread(error)}); prepare the part again") from None


def held_out_of(options: Mapping[str, Any], folder: Path) -> float:
    """Return the share of documents that a folder or a part holds out. Raises: DataError: it does not say so."""
    share = options.get("held_out")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise DataError(f"input = {folder} says held_out = {str(share)[:40]}, which is no share; prepare it again")
    return float(share)


class Output:
    """A folder that shards are made in."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.work = self.folder / WORK
        self._journal = self.work / "tasks.jsonl"
        self._begun = self.work / BEGUN

    @property
    def is_tidy(self) -> bool:
        """Whether nothing is left of the work: a kill can come after the manifest is written."""
        return not self.work.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out of the folder for as long as the block lasts.

        Raises: DataError: it cannot be written, or holds something else. RunInUseError: another process works there.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"output = {self.folder} is a file; name a folder")
        for path in (self.work, self._journal, self._begun):
            if path.is_symlink():  # what is behind it would be removed when the work is done
                raise DataError(f"{path} is a link, and nothing is written through one; remove it")
        names = {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()
        if names - {PARTS} and not names & {MANIFEST, PART, WORK}:
            raise DataError(f"output = {self.folder} is not empty and not of prepare_data; name another folder")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = held(
                self.work / _LOCK, lambda who: f"output = {self.folder} is in use by {who}; wait for it, or stop it"
            )
            with lock:
                yield
        except PermissionError as error:
            raise DataError(f"output = {self.folder} cannot be written ({error.strerror}); name another") from None
        finally:
            with suppress(OSError):  # not empty: something was begun, or another process has the lock
                self.work.rmdir()
                self.folder.rmdir()

    def begin(self, fingerprint: str, command: str) -> list[Done]:
        """Return the tasks that an earlier run of the same work has done.

        Args:
            fingerprint: of inputs, options and tokenizer.
            command: what was typed; whoever meets the folder unfinished is told to run it again.
        Raises: DataError: something else was begun in the folder.
        """
        earlier = read_json(self._begun).get("fingerprint")
        if earlier is None and any(not self._may_be_left(entry.name) for entry in self.work.iterdir()):
            earlier = "of an older version, or torn"
        if earlier not in (None, fingerprint):
            raise DataError(
                f"output = {self.folder} holds what another command began and did not finish; finish it, name another "
                f"folder, or remove it; it was: {command_begun(self.folder)}"
            )
        write_json(self._begun, {"fingerprint": fingerprint, "command": command})
        cut_json_lines(self._journal, lambda _: True)  # a line that a kill has torn
        return self.done()

    def _may_be_left(self, name: str) -> bool:
        """Return whether a file of the work is no work: of a lock, or of a kill before anything was begun."""
        return name.startswith((_LOCK, self._begun.name))

    def done(self) -> list[Done]:
        """Return the tasks of the journal. Raises: DataError: it is damaged."""
        try:
            return [Done.model_validate(line) for line in iterate_json_lines(self._journal)]
        except (OSError, ValueError) as error:
            raise DataError(f"{self._journal} cannot be read ({why_unread(error)}); remove {self.folder}") from None

    def keep(self, done: Done) -> None:
        """Write in the journal that a task is done; its files are on the disk."""
        with appended_file(self._journal) as file:
            line = memoryview((json.dumps(done.model_dump(mode="json")) + "\n").encode())
            while line:  # unbuffered: the system may take less than all
                line = line[file.write(line) :]
            os.fsync(file.fileno())

    def close(self) -> None:
        """Remove what only the work needed; what readers look for is written. The lock stays while it is held."""
        self._remove(lambda name: name != _LOCK)

    def forget(self) -> None:
        """Remove a work that came to nothing, so that another can be begun in the folder."""
        self._remove(lambda name: name not in (_LOCK, self._begun.name))
        self._begun.unlink(missing_ok=True)  # last: a kill before it leaves what the same command begins again

    def _remove(self, which: Callable[[str], bool]) -> None:
        for entry in filter(lambda entry: which(entry.name), list(self.work.iterdir())):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def other(self) -> DataError:
        """Return what to say of a folder that was made of something else."""
        return DataError(
            f"output = {self.folder} was made of other inputs, options or another tokenizer; "
            "name another folder, or remove it"
        )
