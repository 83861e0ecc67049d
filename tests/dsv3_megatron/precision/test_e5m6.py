"""E5M6, the 12-bit cache format: every number there is, rounding to nearest even, and tiles that can be cut anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.precision.e5m6 import LARGEST, _pack, _rounded, _unpack, quantise_e5m6
from dsv3_megatron.precision.formats import E4M3
from dsv3_megatron.precision.tiles import quantise
from testing.lanes import examples


def every_number():
    """Return the format's numbers from its definition: (-1)^s 2^(e - 15) (1 + m / 64), subnormals below 2^-14."""
    found = [m / 64 * 2.0**-14 for m in range(64)]
    found += [(1 + m / 64) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(64)]
    return torch.tensor(found)


def test_every_number_of_the_format_survives_and_takes_twelve_bits():
    numbers = torch.cat([every_number(), -every_number()])
    assert numbers.abs().max() == LARGEST
    assert torch.equal(_rounded(numbers), numbers)
    packed = _pack(numbers)
    assert packed.dtype is torch.uint8 and packed.numel() == numbers.numel() * 3 // 2
    assert torch.equal(_unpack(packed), numbers)


@settings(deadline=None, max_examples=examples(200))
@given(st.floats(-LARGEST, LARGEST, width=32))
def test_rounding_is_to_the_nearest_even_number(value):
    numbers = every_number()
    found = _rounded(torch.tensor([value])).double().item()
    distance = (numbers.double() - abs(value)).abs()
    nearest = (distance == distance.min()).nonzero().flatten()
    expected = numbers[nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]].item()
    assert abs(found) == expected and (found == 0 or (found < 0) == (value < 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 200), (1, 1), (4, 127)])
def test_a_tile_keeps_six_mantissa_bits(dtype, shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 10.0 ** torch.randint(-3, 3, shape[:-1]).unsqueeze(-1)).to(dtype)
    found = quantise_e5m6(x)
    error = (found.dequantise() - x.float()).abs() / x.float().abs().clamp(min=1e-30)
    assert error.max() <= 2**-7 and found.dequantise().shape == x.shape
    assert found.nbytes == x.numel() // x.shape[-1] * (-(-x.shape[-1] // 2) * 3 + 4 * -(-x.shape[-1] // 128))


def test_zero_tiles_and_nan_survive():
    x = torch.zeros(2, 128)
    assert torch.equal(quantise_e5m6(x).dequantise(), x)
    x[1, 3] = float("nan")
    assert quantise_e5m6(x).dequantise()[1, 3].isnan()


def test_it_is_eight_times_finer_than_fp8_and_is_cut_along_tokens_without_error_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    cached = quantise_e5m6(x).dequantise()
    fine, coarse = (cached - x).norm() / x.norm(), (quantise(x, (1, 128), E4M3).dequantise() - x).norm() / x.norm()
    assert fine < coarse / 7
    again = quantise_e5m6(cached.t().contiguous()).dequantise().t()
    assert torch.equal(again, cached)
