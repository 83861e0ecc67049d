"""The numbers of published files: read where they lie, a tensor or one expert of a stack at a time, and checked."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_megatron.checkpoint.hugging_face.headers import Header
from dsv3_megatron.checkpoint.hugging_face.sources import Source, Stored
from dsv3_megatron.precision.weights import dequantise_weight
from parallel.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OpenFiles:
    """The safetensors of a folder, each opened when something of it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, header: Header, expert: int | None = None) -> Tensor:
        """Return a tensor, or one expert of a stack, as stored. Raises: CheckpointError: the file cannot be read."""
        path = self.folder / header.file
        try:
            if header.file not in self._opened:
                self._opened[header.file] = self._stack.enter_context(safe_open(path, "pt"))
            file = self._opened[header.file]
            return file.get_tensor(header.name) if expert is None else file.get_slice(header.name)[expert]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from None

    def values(self, stored: Stored, dtype: str | None) -> Tensor:
        """Return the numbers of a matrix or vector.

        Args:
            dtype: fp32 or bf16; None = as stored, FP8 as BF16.
        Raises: CheckpointError: some are not finite, as stored or in that dtype.
        """
        found = self.read(stored.tensor, stored.expert)
        if stored.scale is not None:
            scales = as_numbers(self.read(stored.scale, stored.expert))
            values = dequantise_weight(found, scales, DTYPES[dtype or "bf16"], tile=stored.tile)
        else:
            values = found if dtype is None else found.to(DTYPES[dtype])
        if not bool(values.isfinite().all()):
            place = f"{self.folder / stored.tensor.file}: {stored.tensor.name}"
            place += "" if stored.expert is None else f" (expert {stored.expert})"
            if bool(found.float().isfinite().all()):
                raise CheckpointError(f"{place} holds numbers that {dtype or 'bf16'} cannot; use dtype=fp32")
            count, first = _not_finite(found if stored.scale is None else values)
            raise CheckpointError(f"{place} holds NaN or Inf ({count:,} of them, the first at {first}); fetch it again")
        return values


def _not_finite(values: Tensor) -> tuple[int, list[int]]:
    """Return how many numbers are not finite, and the indices of the first."""
    wrong = ~values.float().isfinite()
    return int(wrong.sum()), [int(index) for index in wrong.nonzero()[0]]


def as_numbers(scales: Tensor) -> Tensor:
    """Return scales as float32; exponents may be stored as plain bytes."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def check_copy(files: OpenFiles, source: Source, values: Tensor, dtype: str | None) -> None:
    """Refuse an MTP module with an embedding or head of its own: here, as published, they are the model's."""
    if source.copy_of is None:
        return
    original = files.values(source.copy_of, dtype)
    if not torch.equal(values, original.to(values.dtype)):
        tensor = source.stored.tensor
        raise CheckpointError(
            f"{files.folder / tensor.file}: {tensor.name} differs from {source.copy_of.tensor.name}; an MTP module "
            "that does not share them with the model cannot be built here"
        )
