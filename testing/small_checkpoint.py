"""A checkpoint of one tensor in two pieces, which a test may make a stranger's: checksums match what was changed."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dsv3_megatron.checkpoint.hugging_face.regions import Regions
from dsv3_megatron.checkpoint.index import Described, describe_pieces, read_index
from dsv3_megatron.checkpoint.manifest import MANIFEST, RECIPE, WEIGHTS, manifest_text
from dsv3_megatron.checkpoint.piece_files import PieceFile, write_file
from dsv3_megatron.checkpoint.read import misfit, read_entries
from dsv3_megatron.checkpoint.write import write_description
from dsv3_megatron.pipeline.saved import Entry
from parallel.errors import CheckpointError

FILE = "__0_0.distcp"
WHOLE = torch.arange(24, dtype=torch.float32).view(4, 6)
BOXES = [Described("a", (4, 6), (0, 0), (2, 6), torch.float32), Described("a", (4, 6), (2, 0), (2, 6), torch.float32)]


def checkpoint(
    folder: Path,
    index: Callable[[Any], Any] = lambda found: found,
    boxes: list[Described] = BOXES,
    piece: bytes | None = None,
) -> Path:
    """Write a checkpoint of one tensor in two pieces; ``index`` changes what it says, ``piece`` is the second one."""
    folder.mkdir()
    file = PieceFile(folder / FILE)
    places = [file.add(WHOLE[:2])]
    places.append(file.add(WHOLE[2:]) if piece is None else put(file, piece))
    files = {FILE: {**file.finish(), "holds": WEIGHTS}}
    stored = index(describe_pieces({FILE: boxes}, {FILE: places}))
    files |= write_description(stored if isinstance(stored, bytes) else pickle.dumps(stored), folder)
    files[RECIPE] = write_file(folder / RECIPE, b"")
    progress = {"step": 0, "tokens": 0, "samples": 0, "skipped": 0}
    facts = {"layout": None, "extra": [], "optimizer": False}
    (folder / "manifest.json").write_text(manifest_text(progress, files, facts))
    return folder


def put(file: PieceFile, data: bytes) -> tuple[int, int]:
    """Add bytes in place of a tensor."""
    start = file.tell()
    file.write(data)
    file._rows.append(struct.pack("<QQ16s", start, len(data), xxhash.xxh3_128_digest(data)))
    return start, len(data)


def seal(folder: Path, content: object) -> None:
    """Write a manifest that says this, with a checksum that matches."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps({"xxh3": digest, "content": content}))


def replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, and let the manifest's checksum of it match."""
    (folder / name).write_bytes(data)
    content = json.loads((folder / MANIFEST).read_text())["content"]
    content["files"][name] |= {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    seal(folder, content)


def both(folder: Path) -> Tensor:
    """Read it in both ways: as a run does, and as an export does."""
    index = read_index(folder)
    found = torch.full((4, 6), -1.0)
    entries = [Entry("a", (4, 6), (0, 0), found)]
    if reason := misfit(index, entries):
        raise CheckpointError(reason)
    read_entries(folder, index, entries, checked=True)
    regions = Regions(folder)
    other = regions.read("a", (0, 0), (4, 6))
    assert torch.equal(other.view(torch.int32), found.view(torch.int32)) and regions.shapes["a"] == (4, 6)
    return found
