"""FP8 numbers inside a kernel, by integer arithmetic: the same bits on a GPU and in Triton's interpreter.

A format has M bits of mantissa and an exponent bias B: E4M3 is (3, 7), E5M2 (2, 15).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(y, M: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Return float32 ``y`` as the format's bits (uint8), to nearest even, NaN kept, what is larger than the format's
    largest number brought there."""
    y = tl.where(y == y, tl.minimum(tl.maximum(y, -LARGEST), LARGEST), y)
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # A normal number: its mantissa is rounded by carrying into the exponent, whose bias is exchanged.
    cut: tl.constexpr = 23 - M
    rounded = size + ((1 << (cut - 1)) - 1) + ((size >> cut) & 1)
    normal = (rounded >> cut) - ((127 - BIAS) << M)
    # A subnormal one counts units of 2^(1 - BIAS - M): added to a number with that unit, float32 rounds it itself.
    unit: tl.constexpr = (127 + 1 - BIAS - M + 23) << 23
    large = tl.full(size.shape, unit, tl.int32).to(tl.float32, bitcast=True)
    small = (size.to(tl.float32, bitcast=True) + large).to(tl.int32, bitcast=True) - unit
    least: tl.constexpr = (127 + 1 - BIAS) << 23  # the smallest normal number
    code = tl.where(size < least, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode(code, M: tl.constexpr, BIAS: tl.constexpr):
    """Return the format's bits (uint8) as float32. E5M2's infinities are not told from NaN: no tile holds any."""
    bits = code.to(tl.int32)
    size = bits & 0x7F
    cut: tl.constexpr = 23 - M
    normal = ((size << cut) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    unit: tl.constexpr = (127 + 1 - BIAS - M) << 23
    small = size.to(tl.float32) * tl.full(size.shape, unit, tl.int32).to(tl.float32, bitcast=True)
    value = tl.where(size < (1 << M), small, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr, MOST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Return the scales of tiles from their largest magnitudes (precision/tiles.py, rules 1 to 3).

    ``MOST``: the largest finite value of the tensor's dtype.
    """
    usable = (amax > 0) & (amax < float("inf"))
    scale = tl.math.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(usable, amax, LARGEST))
    scale = tl.minimum(scale, MOST)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def size_of(x):
    """Return magnitudes as a tile's largest one counts them: NaN as zero."""
    return tl.where(x == x, tl.abs(x), 0.0)
