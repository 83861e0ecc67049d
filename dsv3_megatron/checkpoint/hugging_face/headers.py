"""What a folder of published weights holds, from the headers of its safetensors alone: no number is read.

The files are asked, and the index must say the same. Whatever is missing, doubled or left over is refused here, before
the long work starts.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dsv3_megatron.checkpoint.hugging_face.config_keys import shown
from dsv3_megatron.run.handed import inside, open_regular, read_json_file
from parallel.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TRAINED_WITH = "trained_with"  # in the metadata of an index that an export wrote: tokenizer and text by their digests
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHERS = (".gguf", ".npz", ".h5", ".msgpack", ".onnx")
# Pickles of trainers that hold no weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_HEADER_BYTES = 1 << 25  # of a file's description of its tensors, a hundred bytes each
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """A tensor as its file announces it."""

    name: str
    file: str
    dtype: str  # as safetensors spells it: F32, BF16, F8_E4M3 ...
    shape: tuple[int, ...]


def and_more(names: Collection[object]) -> str:
    """Return what follows the first of several names in a message."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def holds_weights(folder: Path) -> bool:
    """Return whether a folder holds safetensors. Raises: CheckpointError: it holds weights in other formats alone."""
    if (folder / INDEX).exists() or _safetensors(folder):
        return True
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(_NO_WEIGHTS))
    if pickled := [path for path in files if path.suffix in _PICKLED or path.name.endswith(".bin.index.json")]:
        raise CheckpointError(
            f"{pickled[0]}{and_more(pickled)}: pickled weights are not read; convert them with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER)"
        )
    if others := [path for path in files if path.suffix in _OTHERS]:
        raise CheckpointError(
            f"{others[0]}{and_more(others)}: weights are read from safetensors alone; fetch the model's safetensors"
        )
    return False


def read_trained_with(folder: Path, what: str) -> dict[str, Any] | None:
    """Return what an export's index says of the ``tokenizer`` or the ``data`` that its model was trained with; None
    where there is no index, or another program wrote it."""
    try:
        found = read_json_file(inside(folder, INDEX))["metadata"][TRAINED_WITH][what]
        described = {"sha256": found["sha256"], "name": found["name"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(isinstance(value, str) for value in described.values()) else None


def read_headers(folder: Path) -> dict[str, Header]:
    """Return every tensor of a folder, by name.

    Raises: CheckpointError: a file is missing, damaged or a pointer of Git LFS; index and files say different things.
    """
    index = _read_index(folder) if (folder / INDEX).exists() else None
    if index is None and not (folder / SINGLE).exists():
        raise CheckpointError(f"{folder} holds neither {INDEX} nor {SINGLE}; is the export finished?")
    files = sorted(set(index.values())) if index is not None else [SINGLE]
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder / absent[0]} is missing{and_more(absent)}; fetch it again")
    if unnamed := sorted({path.name for path in _safetensors(folder)} - set(files)):
        beside = SINGLE if index is None else f"what {INDEX} names"
        raise CheckpointError(
            f"{folder / unnamed[0]}{and_more(unnamed)} lies beside {beside}; remove it, or fetch the index again"
        )
    found: dict[str, Header] = {}
    for file in files:
        for header in _headers(folder, file):
            if (other := found.get(header.name)) is not None:
                raise CheckpointError(
                    f"{folder}: {header.name} is in {other.file} and in {file}; keep the files of one model alone"
                )
            found[header.name] = header
    if index is not None:
        _compare(folder, index, found)
    return found


def _safetensors(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, as the index says."""
    path = folder / INDEX
    try:
        index = read_json_file(inside(folder, INDEX))["weight_map"]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} cannot be read (it holds no weight_map); fetch it again") from None
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} names no tensors; fetch it again")
    for name, file in index.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise CheckpointError(
                f"{path} says that {shown(name)[1:-1]} is in {shown(file)}, which is no safetensors file of this "
                "folder; fetch it again"
            )
    return index


def _headers(folder: Path, file: str) -> Iterator[Header]:
    path = folder / file
    try:
        with open_regular(inside(folder, file)) as raw:
            beginning, size = raw.read(len(_POINTER)), os.fstat(raw.fileno()).st_size
        if beginning == _POINTER:
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; run: git lfs pull")
        length = int.from_bytes(beginning[:8], "little")
        if length > min(size - 8, _HEADER_BYTES):
            raise ValueError(f"its header would have {length:,} bytes")
        with safe_open(path, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                tensor = opened.get_slice(name)
                yield Header(name, file, tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None


def _compare(folder: Path, index: dict[str, str], found: dict[str, Header]) -> None:
    """Refuse an index that says something else than the files do."""
    for name, file in index.items():
        if name not in found:
            raise CheckpointError(f"{folder / INDEX} says that {name} is in {file}, which lacks it; fetch both again")
        if found[name].file != file:
            raise CheckpointError(
                f"{folder / INDEX} says that {name} is in {file}, but it is in {found[name].file}; fetch them again"
            )
    if unnamed := sorted(found.keys() - index.keys()):
        raise CheckpointError(
            f"{folder / found[unnamed[0]].file} holds {unnamed[0]}{and_more(unnamed)}, which {INDEX} does not name; "
            "fetch both again"
        )
