"""The scales that FP8 weights came with: checked before anything long starts, and kept for the way back.

Numbers do not tell their scale (``precision.weights.requantise_weight``), so an import keeps those of 128x128 blocks in
the run directory, and an export in FP8 gives every block that is still as it was published the same bytes again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, float8_e8m0fnu

from dsv3_megatron.checkpoint.hugging_face.headers import Header
from dsv3_megatron.checkpoint.hugging_face.quantisation import POWERS
from dsv3_megatron.checkpoint.hugging_face.sources import Sources
from dsv3_megatron.checkpoint.hugging_face.values import OpenFiles, as_numbers
from dsv3_megatron.precision.weights import BLOCK
from dsv3_megatron.run.handed import inside, open_regular
from parallel.errors import CheckpointError

_FORM = "scale_fmt"  # of the file's metadata: ue8m0 or float, as quantization_config spells it


def check_scales(sources: Sources) -> str | None:
    """Read all scales, one number in 16,384 of the weights; return what is to be told of them, None = nothing.

    Raises: CheckpointError: one is NaN, infinite, zero or negative.
    """
    odd = []
    with OpenFiles(sources.folder) as files:
        for scale in _headers(sources):
            numbers = as_numbers(files.read(scale))
            if not _are_scales(numbers):
                raise CheckpointError(
                    f"{sources.folder / scale.file}: {scale.name} holds a scale that is not above 0 and finite; "
                    "fetch it again"
                )
            if not _are_powers(numbers):
                odd.append(scale.name)
    if sources.quantisation.power_of_two and odd:
        return (
            f"quantization_config.scale_fmt = ue8m0, but {odd[0]} and {len(odd) - 1} more hold scales that are no "
            "powers of two; they are read as they are"
        )
    return None


def keep_scales(sources: Sources, path: Path) -> None:
    """Write the scales of 128x128 blocks, by the published names of their weights; no file where there are none.

    Raises: OSError: the disk refused.
    """
    path.unlink(missing_ok=True)
    kept: dict[str, Tensor] = {}
    with OpenFiles(sources.folder) as files:
        for source in sources.found:
            scale = source.stored.scale
            if scale is None or source.stored.expert is not None or source.copy_of is not None:
                continue
            if source.stored.tile == BLOCK and len(scale.shape) == 2:
                found = files.read(scale)
                numbers = as_numbers(found)
                kept[source.target.name] = numbers.to(float8_e8m0fnu) if scale.dtype in POWERS else numbers
    if not kept:
        return
    wanted = sources.quantisation.power_of_two or all(scale.dtype in POWERS for scale in _headers(sources))
    form = "ue8m0" if wanted and all(_are_powers(scales.float()) for scales in kept.values()) else "float"
    partial = path.with_name(f".{path.name}.partial")
    save_file(kept, partial, metadata={_FORM: form})
    partial.replace(path)


def has_power_of_two_scales(path: Path) -> bool | None:
    """Return whether a run's weights came with scales that are powers of two; None where none were kept."""
    if not os.path.lexists(path):
        return None
    with _reading(path):
        open_regular(inside(path.parent, path.name)).close()
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get(_FORM) == "ue8m0")


def kept_scales(path: Path, name: str, grid: tuple[int, int]) -> Tensor | None:
    """Return the scales that a weight came with, as they were stored; None where none were kept of it.

    Args:
        grid: how many there must be.
    Raises: CheckpointError: the file cannot be read, or they are no scales of this weight.
    """
    with _reading(path):
        file, names = _opened(path, path.stat().st_mtime_ns)
        if name not in names:
            return None
        found = file.get_tensor(name)
        if tuple(found.shape) != grid or found.dtype not in (torch.float32, torch.float8_e8m0fnu):
            raise ValueError(f"scales of {name} are {found.dtype} of {list(found.shape)}, not of {list(grid)}")
        if not _are_scales(found.float()):
            raise ValueError(f"it holds a scale of {name} that is not above 0 and finite")
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); import the weights again, or remove it") from None


def _are_scales(numbers: Tensor) -> bool:
    return bool(((numbers > 0) & numbers.isfinite()).all())


@functools.lru_cache(maxsize=1)
def _opened(path: Path, written: int) -> tuple[safe_open, frozenset[str]]:
    """Return the file, as it was ``written`` last, and the names in it: opened once a worker."""
    file = safe_open(path, "pt")
    return file, frozenset(file.keys())


def _headers(sources: Sources) -> list[Header]:
    """Return every scale of a folder once; those of a stack serve many sources."""
    found = {s.stored.scale.name: s.stored.scale for s in sources.found if s.stored.scale is not None}
    return list(found.values())


def _are_powers(numbers: Tensor) -> bool:
    mantissa, _ = numbers.frexp()
    return bool((mantissa == 0.5).all())
