"""``.metadata`` of torch's distributed checkpoints: a pickle, read as data and checked.

What it stands for is made of plain values here, of the right types, so that no file decides what is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_megatron.checkpoint.manifest import FileFacts
from dsv3_megatron.checkpoint.stored.pickled import Record, read_pickle
from dsv3_megatron.checkpoint.stored.saved_tensor import DTYPES

# What torch 2.6 to 2.13 and megatron-core 0.16 put into an index. ``_get_layout`` and the enums are named, and not
# called: of a tensor's properties only the dtype counts.
_TORCH = "torch.distributed.checkpoint."
_NAMES = frozenset(
    {
        *DTYPES,
        "torch.Size",
        "torch.serialization._get_layout",
        _TORCH + "filesystem._StorageInfo",
        *(f"{_TORCH}metadata.{name}" for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )),
        *(f"{_TORCH}planner.{name}" for name in (
            "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
        )),
    }
)  # fmt: skip


def metadata_of(stored: bytes, files: FileFacts) -> Metadata:
    """Return an index: the tensors and where their pieces lie, in ``files`` of the manifest.

    Raises: ValueError: it is torn, names what no index does, or describes what the files do not hold.
    """
    try:
        return _metadata(read_pickle(stored, _NAMES), files)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("it is no index") from None


def _metadata(found: Any, files: FileFacts) -> Metadata:
    state = _state(found, "metadata.Metadata")
    tensors: dict[str, STORAGE_TYPES] = {}
    for key, tensor in state["state_dict_metadata"].items():
        is_bytes = tensor.name == f"{_TORCH}metadata.BytesStorageMetadata"
        tensors[_is(key, str)] = BytesStorageMetadata() if is_bytes else _tensor(key, tensor)
    places: dict[MetadataIndex, _StorageInfo] = {}
    for box, info in state["storage_data"].items():
        place, named = _place(info, files), _state(box, "metadata.MetadataIndex")
        corner = named.get("offset")
        index = MetadataIndex(_is(named["fqn"], str), None if corner is None else _size(corner))
        if index.fqn not in tensors or index in places:
            raise ValueError(f"it says twice, or of no tensor, where {index.fqn} lies")
        places[index] = place
    for key, described in tensors.items():
        for chunk in described.chunks if isinstance(described, TensorStorageMetadata) else ():
            if MetadataIndex(key, chunk.offsets) not in places:
                raise ValueError(f"it does not say where {key} lies from {tuple(chunk.offsets)} on")
    return Metadata(state_dict_metadata=tensors, storage_data=places)


def _tensor(key: str, found: Any) -> TensorStorageMetadata:
    state = _state(found, "metadata.TensorStorageMetadata")
    properties = found.state["properties"]
    if properties.name != f"{_TORCH}metadata.TensorProperties":
        raise ValueError(f"it does not say what numbers {key} has")
    dtype, whole = DTYPES[properties.state[0].name], _size(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        box = _state(chunk, "metadata.ChunkStorageMetadata")
        start, extent = _size(box["offsets"]), _size(box["sizes"])
        if not len(start) == len(extent) == len(whole) or any(a + b > c for a, b, c in zip(start, extent, whole)):
            raise ValueError(f"{key} of shape {tuple(whole)} has no box {tuple(extent)} at {tuple(start)}")
        chunks.append(ChunkStorageMetadata(start, extent))
    if sum(chunk.sizes.numel() for chunk in chunks) != whole.numel():
        raise ValueError(f"{key} is not stored whole")
    return TensorStorageMetadata(TensorProperties(dtype), whole, chunks)


def _place(found: Any, files: FileFacts) -> _StorageInfo:
    state = _state(found, "filesystem._StorageInfo")
    name, start, length = _is(state["relative_path"], str), _is(state["offset"], int), _is(state["length"], int)
    if name not in files or start < 0 or length <= 0 or start + length > files[name]["bytes"]:
        raise ValueError(f"the manifest knows no bytes {start} to {start + length} of {name!r}")
    if state.get("transform_descriptors"):
        raise ValueError(f"pieces of {name} are transformed, which is not read")
    return _StorageInfo(name, start, length)


def _state(found: Any, name: str) -> dict[str, Any]:
    if type(found) is not Record or found.name != _TORCH + name or type(found.state) is not dict:
        raise ValueError(f"it has no {name} where one belongs")
    return found.state


def _size(found: Any) -> torch.Size:
    if type(found) is not Record or found.name != "torch.Size":
        raise ValueError("it has no torch.Size where one belongs")
    (sizes,) = found.arguments
    if type(sizes) is not tuple or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError("it has sizes that are none")
    return torch.Size(sizes)


def _is(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
