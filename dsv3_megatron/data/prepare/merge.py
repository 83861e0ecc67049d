"""Folders of shards joined into one: the parts of one preparation, or folders that were prepared each by itself.

Parts become what one process without parts makes, to the byte (join_parts.py). Folders keep their shards, as parts of
the sources with their names (join_folders.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dsv3_megatron.data.begun import PART, PARTS, WORK, typed_command, unfinished
from dsv3_megatron.data.prepare.join_folders import FoldersJoin
from dsv3_megatron.data.prepare.join_parts import PartsJoin
from dsv3_megatron.data.prepare.output import Output
from dsv3_megatron.data.prepare.pack import PackAhead
from dsv3_megatron.data.raw.inputs import printable
from dsv3_megatron.data.source.shards import MANIFEST, TOKENIZER, Manifest, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.handed import real_path
from parallel.errors import DataError


class Join(Protocol):
    """Folders that fit together. ``fingerprint``: of what the joined folder holds."""

    tokenizer: Tokenizer
    fingerprint: str

    def run(self, output: Output) -> Manifest:
        """Write what the folders hold into ``output``; return its manifest."""


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
    if any(real_path(folder) == real_path(result.folder) for folder in folders):
        raise DataError(
            f"output = {output} is one of the inputs, and finished; name another folder, or leave it as it is "
            "(launcher/data.py pack packs it)"
        )
    joining: Join = PartsJoin(parts, memory, workers) if parts else FoldersJoin(folders, tell)
    ahead.check(joining.tokenizer, folders[0] / TOKENIZER)
    finished = _finished(joining, result)
    if finished is not None and result.is_tidy and ahead.is_made(result.folder):
        return finished
    with result.locked():
        manifest = _finished(joining, result)  # by whoever had the lock
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
        if (given / PARTS).is_dir() and (real_path(given) == real_path(output) or not (given / MANIFEST).exists()):
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
        if real_path(folder) in seen:
            raise DataError(f"input = {folder} is named twice; leave one out")
        seen.add(real_path(folder))
    return found


def _finished(join: Join, output: Output) -> Manifest | None:
    """Return what an earlier merge of the same has finished. Raises DataError: the output is something else."""
    if not (output.folder / MANIFEST).exists():
        return None
    manifest = read_manifest(output.folder)
    if manifest.options.get("fingerprint") != join.fingerprint:
        raise DataError(
            f"output = {output.folder} is finished already, of something else; name another folder, or remove its "
            f"{MANIFEST}"
        )
    return manifest
