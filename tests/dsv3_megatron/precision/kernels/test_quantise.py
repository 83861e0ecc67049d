"""Quantisation by kernels, interpreted: bit for bit the emulation's numbers and scales, there and back."""

import itertools

import pytest
import torch

from dsv3_megatron.precision.formats import E4M3, E5M2
from dsv3_megatron.precision.tiles import KERNEL_TILES, quantise
from testing.fp8_numbers import KINDS, numbers
from testing.triton.compiler import SHARED_MEMORY, compiled
from testing.triton.interpreter import interpreted

MODULE = "dsv3_megatron.precision.kernels.quantise"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((33, 140), (1, 1), (0, 256))
# Two matrices that end in the midst of a program's rows, as many as it takes by the tile.
MATRICES = {(1, 128): (2, 35, 40), (128, 1): (2, 129, 40), (128, 128): (2, 129, 40)}


def drawn(kind, shape, dtype):
    """Return numbers of a kind in a dtype."""
    x = numbers(kind, shape)
    if kind == "tiny" and dtype is torch.bfloat16:  # whose subnormal numbers the interpreter reads wrong (3.9)
        x = 30 * x  # the scale is cut to the dtype's largest number here too
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0.0, x)
    return x.to(dtype)


CASES = [
    (kind, shape, dtype, tile, fmt, power_of_two)
    for kind, dtype, tile in itertools.product(KINDS, DTYPES, KERNEL_TILES)
    for shape in (*SHAPES, MATRICES[tile])
    for fmt, power_of_two in ((E4M3, True), (E5M2, True), (E4M3, False))
]  # fmt: skip


def differences(dtype):
    """Return the cases of a dtype in which a kernel's bits are not the emulation's."""
    from dsv3_megatron.precision.kernels import quantise as kernels

    wrong = []
    for kind, shape, dtype, tile, fmt, power_of_two in (case for case in CASES if case[2] is dtype):
        x = drawn(kind, shape, dtype)
        wanted = quantise(x, tile, fmt, power_of_two=power_of_two)
        same = {}
        for where, given in (("", x), (", transposed", x.mT.contiguous().mT)):  # as callers hand them on
            data, scale_inv = kernels.quantise(given, tile, fmt, power_of_two=power_of_two)
            same[f"numbers{where}"] = torch.equal(data.view(torch.uint8), wanted.data.view(torch.uint8))
            same[f"scales{where}"] = torch.equal(scale_inv, wanted.scale_inv)
        back = kernels.dequantise(wanted.data, wanted.scale_inv, tile, fmt, torch.float32)
        same["back"] = torch.equal(back.nan_to_num(7.0), wanted.dequantise().nan_to_num(7.0))
        wrong += [(what, kind, shape, dtype, tile, fmt.name) for what, equal in same.items() if not equal]
    return wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_and_scales_are_the_emulations_bit_for_bit(dtype):
    assert interpreted(differences, [dtype]) == [[]]


def test_they_compile_for_a_gpu():
    sizes = {name: "i32" for name in ("rows", "columns")}
    strides = {name: "i32" for name in ("of_matrix", "of_row", "of_column")}
    kernels = []
    for a, b in KERNEL_TILES:
        cut = {"A": a, "B": b, "ROWS": max(a, 32), "COLUMNS": max(b, 32), "M": 3, "BIAS": 7}
        rules = {"LARGEST": 448.0, "MOST": torch.finfo(torch.bfloat16).max, "POWER_OF_TWO": True}
        tensors = {"x": "*bf16", "data": "*u8", "scale_inv": "*fp32"}
        back = {"data": "*u8", "scale_inv": "*fp32", "out": "*fp32"}
        kernels.append((MODULE, "_quantise", tensors | sizes | strides | cut | rules, {"num_warps": 4}))
        kernels.append((MODULE, "_dequantise", back | sizes | cut, {"num_warps": 4}))
    for text, shared in compiled(kernels):
        assert "ld.global" in text and shared <= SHARED_MEMORY
        assert ".ftz" not in text  # subnormal numbers count
