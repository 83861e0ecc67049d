"""What was begun in a folder of shards and is not finished: who writes it there finds it again, who reads is told."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.run.files import read_json
from dsv3_megatron.run.handed import real_path

WORK, PARTS, PART = ".prepare", "parts", "part.json"
BEGUN = "begun.json"  # in WORK: fingerprint of what was begun, and the command that finishes it
_PART_FOLDER = re.compile(r"([0-9]{3,5})_of_([0-9]{3,5})")
_MOST_CHARACTERS = 10_000  # of a command that is repeated
_MOST_NAMED = 8  # inputs or parts, in a line


def folder_of_part(output: str | Path, part: int, parts: int) -> Path:
    """Return where a part of the shards of ``output`` is made."""
    return Path(output) / PARTS / f"{part:03d}_of_{parts:03d}"


def typed_command(script: str, inputs: Sequence[str], **keys: object) -> str:
    """Return a command as it is typed; of many inputs the first are named, and dots stand for the rest."""
    names = [name.replace("\\", "\\\\").replace(",", "\\,") for name in inputs[:_MOST_NAMED]]
    words = [f"input={','.join(names)}{',...' if len(inputs) > _MOST_NAMED else ''}"]
    words += [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return f"python {script} {' '.join(map(shlex.quote, words))}"


def command_begun(folder: str | Path) -> str | None:
    """Return the command that was begun in a folder and not finished, as it is typed; None where there is none."""
    work = Path(folder) / WORK
    if not work.is_dir():
        return None
    command = read_json(work / BEGUN).get("command")
    # Whoever reads it may type it: only what this program would have written is repeated.
    return command if isinstance(command, str) and _is_ours(command) else "launcher/prepare_data.py"


def _is_ours(command: str) -> bool:
    try:
        python, script, *words = shlex.split(command)
    except ValueError:
        return False
    ours = python == "python" and script in ("launcher/prepare_data.py", "launcher/data.py")
    return ours and len(command) <= _MOST_CHARACTERS and shlex.join((python, script, *words)) == command


def unfinished(folder: str | Path) -> str | None:
    """Return what a folder without a manifest is, and what finishes it; None: nothing was begun there."""
    folder = Path(folder)
    if (folder / PART).exists():
        whole = real_path(folder).parent.parent if real_path(folder).parent.name == PARTS else None
        part = read_json(folder / PART)
        number, of_how_many = (str(part.get(key))[:9] for key in ("part", "parts"))
        return f"is part {number} of {of_how_many}, to be merged with the others: {_merging(whole)}"
    parts = _parts_of(folder)
    if (folder / WORK / BEGUN).exists() or (command_begun(folder) is not None and not parts):
        return f"was begun and is not finished; run the same command again: {command_begun(folder)}"
    if not parts:
        return None
    count = max(of for _, of in parts)
    made = {number for (number, of), there in parts.items() if there and of == count}
    if missing := sorted({*range(1, count + 1)} - made):
        return (
            f"has {len(made)} of {count} parts finished; prepare part {first_of(missing)} too "
            f"(part={missing[0]}/{count}), then merge them: {_merging(folder)}"
        )
    return f"holds {count} parts that are not merged; merge them: {_merging(folder)}"


def first_of(numbers: Sequence[int]) -> str:
    """Return the first of some numbers as a line names them, and dots where there are more."""
    return ", ".join(map(str, numbers[:_MOST_NAMED])) + (", ..." if len(numbers) > _MOST_NAMED else "")


def _merging(whole: Path | None) -> str:
    return typed_command("launcher/data.py merge", [str(whole or "OUTPUT")], output=whole or "OUTPUT")


def _parts_of(folder: Path) -> dict[tuple[int, int], bool]:
    """Return (number, of how many) of the parts in a folder, each with whether it is finished."""
    found = {}
    for path in (folder / PARTS).iterdir() if (folder / PARTS).is_dir() else ():
        if named := _PART_FOLDER.fullmatch(path.name):
            found[int(named[1]), int(named[2])] = (path / PART).exists()
    return found
