"""A mark beside a file that is finished, so that the same command, begun again, need not make it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.manifest import checksum
from dsv3_megatron.run.files import read_json, write_json


def mark_done(file: Path, source: object, facts: dict[str, Any]) -> dict[str, Any]:
    """Note what a finished file was made of, and ``facts`` about it; return the facts.

    Args:
        source: what JSON can hold; another one makes the file anew.
        facts: hold the file's checksum as ``xxh3``.
    """
    write_json(_mark(file), {"source": source, "facts": facts})
    return facts


def facts_if_done(file: Path, source: object) -> dict[str, Any] | None:
    """Return the facts of a file that is whole and was made of ``source``; None where it must be made.

    A mark that is torn, or of an earlier version's form, vouches for nothing.
    """
    mark = read_json(_mark(file))
    facts = mark.get("facts")
    if mark.get("source") != source or not isinstance(facts, dict) or not file.is_file():
        return None
    return facts if facts.get("xxh3") == checksum(file) else None


def forget_marks(folder: Path) -> None:
    """Remove the marks of a folder whose work is complete."""
    for mark in folder.glob(".*.done"):
        mark.unlink()


def _mark(file: Path) -> Path:
    return file.with_name(f".{file.name}.done")
