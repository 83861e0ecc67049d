"""SwiGLU with its cast to FP8, and back, each in one pass. Legend as in model/layers/swiglu.py: T tokens, I width.

Rounded where torch's own operations round, to the input's dtype: after silu, after its product with up, and after the
weight ``probs``; exponentials may differ in their last bit. Tiles are 1x128, E4M3 (3 bits of mantissa, bias 7, up to
448), with power-of-two scales.

Roofline, bytes a column of the output (BF16): forward 4 read, 2 written, and 2.06 more with the FP8 cache; backward 2
of the gradient and 2.06 of the cache (4 without) read, 4 written. Operations do not count beside that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.precision.formats import E4M3
from dsv3_megatron.precision.kernels.formats import decode, encode, scale_of, size_of

TILE = 128  # columns of a tile, and of a program's step
_TOKENS = 16  # rows of a program

Cache = tuple[Tensor, Tensor]  # of the input [T, 2I]: FP8 numbers, and scale_inv float32 [T, 2I / 128]


def activate(gate_up: Tensor, probs: Tensor | None, *, cached: bool) -> tuple[Tensor, Cache | None]:
    """Return [..., I] from [..., 2I], I a multiple of TILE, and the input in FP8 where ``cached``.

    Args:
        probs: [..., 1], what each token's output is multiplied by, or None.

    Raises:
        ValueError: ``probs`` has not one number a token.
    """
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    probs = _one_a_row(probs, rows)
    out, cache = _output(rows, gate_up.shape, gate_up.dtype), None
    if cached:
        data = torch.empty(gate_up.shape, dtype=E4M3.dtype, device=gate_up.device)
        scales = (*gate_up.shape[:-1], gate_up.shape[-1] // TILE)
        cache = data, torch.empty(scales, dtype=torch.float32, device=gate_up.device)
    if out.numel():
        _activate[_grid(rows, across=True)](
            rows, rows.stride(0), probs, out, *_bytes(cache), len(rows), out.shape[-1],
            MOST=torch.finfo(gate_up.dtype).max, CACHED=cached, WEIGHTED=probs is not None, TOKENS=_TOKENS, TILE=TILE,
        )  # fmt: skip
    return out, cache


def activate_again(cache: Cache, probs: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the output [..., I] from the cache of the input, which counts as rounded to ``dtype``."""
    rows = cache[0].view(-1, cache[0].shape[-1])
    probs, out = _one_a_row(probs, rows), _output(rows, cache[0].shape, dtype)
    if out.numel():
        _activate_again[_grid(rows, across=True)](
            *_bytes(cache), probs, out, len(rows), out.shape[-1],
            WEIGHTED=probs is not None, TOKENS=_TOKENS, TILE=TILE,
        )  # fmt: skip
    return out


def gradients(
    grad: Tensor, gate_up: Tensor | None, cache: Cache | None, probs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the input [..., 2I] and of ``probs``.

    From the output's [..., I], and the input or its cache. Sums for ``probs`` are taken in one order.
    """
    source = cache[0] if cache is not None else gate_up
    assert source is not None, "neither the input nor its cache"
    rows = source.reshape(-1, source.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    grads = grad.reshape(-1, grad.shape[-1])
    grads = grads if grads.stride(-1) == 1 else grads.contiguous()
    probs = _one_a_row(probs, rows)
    to_input = torch.empty(source.shape, dtype=grad.dtype, device=grad.device)
    to_probs = None if probs is None else torch.empty_like(probs)
    if to_input.numel():
        read = (*_bytes(cache), 0) if cache is not None else (rows, None, rows.stride(0))
        _gradients[_grid(rows, across=False)](
            grads, grads.stride(0), *read, probs, to_input, to_probs, len(rows), grad.shape[-1],
            CACHED=cache is not None, WEIGHTED=probs is not None, TOKENS=_TOKENS, TILE=TILE,
        )  # fmt: skip
    elif to_probs is not None:
        to_probs.zero_()
    return to_input, to_probs


def _one_a_row(probs: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return probs one after another in memory, as the kernels read them."""
    if probs is None:
        return None
    if probs.numel() != len(rows):
        raise ValueError(f"probs {tuple(probs.shape)} for {len(rows)} tokens")
    return probs.contiguous()


def _output(rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty((*shape[:-1], shape[-1] // 2), dtype=dtype, device=rows.device)


def _bytes(cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cache is None else (cache[0].view(torch.uint8), cache[1])


def _grid(rows: Tensor, *, across: bool) -> tuple[int, int]:
    """Programs over tokens and, where each does one tile of columns, over those."""
    return triton.cdiv(len(rows), _TOKENS), rows.shape[1] // (2 * TILE) if across else 1


@triton.jit
def _silu(gate):
    return tl.math.div_rn(gate, 1.0 + tl.exp(-gate))


@triton.jit
def _rounded(value, like):
    """Return float32 as what is left of it in the dtype of the pointer ``like``."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _swiglu(gate, up, probs, t, inside, out, WEIGHTED: tl.constexpr):
    value = _rounded(_rounded(_silu(gate), out) * up, out)
    if WEIGHTED:
        value = value * tl.load(probs + t, mask=inside, other=0.0).to(tl.float32)[:, None]
    return value


@triton.jit
def _cache_tile(values, data, scale_inv, t, c, tile, width, inside, MOST: tl.constexpr, TILE: tl.constexpr):
    scale = scale_of(tl.max(size_of(values), axis=1), 448.0, MOST, True)
    tl.store(scale_inv + t * (width // TILE) + tile, tl.math.div_rn(1.0, scale), mask=inside)
    code = encode(values * scale[:, None], 3, 7, 448.0)
    tl.store(data + t[:, None] * width + c[None, :], code, mask=inside[:, None])


@triton.jit
def _from_cache(data, scale_inv, t, c, tile, width, inside, like, TILE: tl.constexpr):
    """A tile of the input as it was cached, rounded as the input was."""
    scale = tl.load(scale_inv + t * (width // TILE) + tile, mask=inside, other=0.0)
    code = tl.load(data + t[:, None] * width + c[None, :], mask=inside[:, None], other=0)
    return _rounded(decode(code, 3, 7) * scale[:, None], like)


@triton.jit
def _activate(
    rows, of_row, probs, out, data, scale_inv, tokens, inner,
    MOST: tl.constexpr, CACHED: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    tile = tl.program_id(1)
    c = tile * TILE + tl.arange(0, TILE)
    inside = t < tokens
    here = rows + t[:, None] * of_row + c[None, :]
    gate = tl.load(here, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(here + inner, mask=inside[:, None], other=0.0).to(tl.float32)
    value = _swiglu(gate, up, probs, t, inside, out, WEIGHTED)
    tl.store(out + t[:, None] * inner + c[None, :], value.to(out.dtype.element_ty), mask=inside[:, None])
    if CACHED:
        _cache_tile(gate, data, scale_inv, t, c, tile, 2 * inner, inside, MOST, TILE)
        _cache_tile(up, data, scale_inv, t, c + inner, tile + inner // TILE, 2 * inner, inside, MOST, TILE)


@triton.jit
def _activate_again(
    data, scale_inv, probs, out, tokens, inner, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr
):
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    tile = tl.program_id(1)
    c = tile * TILE + tl.arange(0, TILE)
    inside = t < tokens
    gate = _from_cache(data, scale_inv, t, c, tile, 2 * inner, inside, out, TILE)
    up = _from_cache(data, scale_inv, t, c + inner, tile + inner // TILE, 2 * inner, inside, out, TILE)
    value = _swiglu(gate, up, probs, t, inside, out, WEIGHTED)
    tl.store(out + t[:, None] * inner + c[None, :], value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _gradients(
    grads, of_grad, source, scale_inv, of_row, probs, to_input, to_probs, tokens, inner,
    CACHED: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = t < tokens
    summed = tl.zeros((TOKENS,), tl.float32)
    if WEIGHTED:
        weight = tl.load(probs + t, mask=inside, other=0.0).to(tl.float32)
    for tile in range(0, inner // TILE):
        c = tile * TILE + tl.arange(0, TILE)
        grad = tl.load(grads + t[:, None] * of_grad + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        if CACHED:
            gate = _from_cache(source, scale_inv, t, c, tile, 2 * inner, inside, to_input, TILE)
            up = _from_cache(source, scale_inv, t, c + inner, tile + inner // TILE, 2 * inner, inside, to_input, TILE)
        else:
            here = source + t[:, None] * of_row + c[None, :]
            gate = tl.load(here, mask=inside[:, None], other=0.0).to(tl.float32)
            up = tl.load(here + inner, mask=inside[:, None], other=0.0).to(tl.float32)
        silu = _rounded(_silu(gate), to_input)
        if WEIGHTED:
            summed += tl.sum(grad * _rounded(silu * up, to_input), axis=1)
            grad = _rounded(grad * weight[:, None], to_input)
        sigmoid = tl.math.div_rn(1.0, 1.0 + tl.exp(-gate))
        to_gate = _rounded(grad * up, to_input) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        there = to_input + t[:, None] * (2 * inner) + c[None, :]
        tl.store(there, to_gate.to(to_input.dtype.element_ty), mask=inside[:, None])
        tl.store(there + inner, (grad * silu).to(to_input.dtype.element_ty), mask=inside[:, None])
    if WEIGHTED:
        tl.store(to_probs + t, summed.to(to_probs.dtype.element_ty), mask=inside)
