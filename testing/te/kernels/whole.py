"""One scale a tensor, from this tensor's amax (current scaling) or from a history of amaxes (delayed scaling)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testing.te.calls import record
from testing.te.kernels.formats import largest, torch_dtype


def quantise_whole(tensor: Tensor, quantizer: Any, output: Any) -> Any:
    """Return a ``Float8Tensor`` (its bare storage where the quantizer is internal), or fill ``output``."""
    top, x = largest(quantizer.dtype), tensor.detach().float()
    amax = x.abs().max() if x.numel() else torch.zeros(())
    if type(quantizer).__name__ == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.reshape(quantizer.amax.shape)))
        scale = quantizer.scale.reshape(()).clone()
    else:
        scale = top / amax if amax > 0 else torch.ones(())
    if getattr(quantizer, "force_pow_2_scales", False):
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    record("quantize", shape=tuple(tensor.shape), tile="tensor", usages=_usages(quantizer), into=output is not None)
    data = (x * scale).clamp(-top, top).to(torch_dtype(quantizer.dtype)).view(torch.uint8)
    columns = _by_columns(data) if quantizer.columnwise_usage else None
    rows, inverse = data if quantizer.rowwise_usage else None, (1 / scale).reshape(1)
    if output is None:
        return _make(tensor, quantizer, rows, columns, inverse)
    output._data, output._transpose, output._transpose_invalid = rows, columns, columns is None
    output._scale_inv.copy_(inverse)
    return output


def _usages(quantizer: Any) -> tuple[str, ...]:
    return tuple(usage for usage in ("rowwise", "columnwise") if getattr(quantizer, f"{usage}_usage"))


def _by_columns(data: Tensor) -> Tensor:
    flat = data.reshape(-1, data.shape[-1]).t().contiguous()
    return flat.reshape(data.shape[-1], *data.shape[:-1])


def _make(tensor: Tensor, quantizer: Any, rows: Tensor | None, columns: Tensor | None, inverse: Tensor) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    fields = {
        "data": rows,
        "fp8_scale_inv": inverse,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": columns,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**fields, fake_dtype=tensor.dtype)
    return Float8Tensor(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device, **fields)


def transpose(input: Tensor, dtype: object, *, out: Tensor | None = None) -> Tensor:
    """Return FP8 numbers [..., K] as [K, ...], made anew from the copy by rows."""
    found = input.reshape(-1, input.shape[-1]).t().contiguous()
    return found if out is None else out.copy_(found)


def update_amax_and_scale(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, fp8_dtype: object, margin: float
) -> None:
    """Push the reduced amaxes into their histories and take every scale from the largest. Raises: another rule."""
    if algorithm != "max" or margin:
        raise NotImplementedError(f"testing/te: delayed scaling by {algorithm}, margin {margin}")
    top, at = largest(fp8_dtype), 0
    for history, scale in zip(histories, scales):
        now = amaxes[at : at + scale.numel()].reshape(scale.shape)
        at += scale.numel()
        history.copy_(torch.roll(history, -1, 0))
        history[-1].copy_(now.reshape(history[-1].shape))
        best = history.max(0).values.reshape(scale.shape)
        history[0].zero_()  # where the next forward notes its amax
        scale.copy_(torch.where(best > 0, top / best, scale))
