"""Tile quantisation: published vectors bit for bit, a slow reference of the rules, and what must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.precision.formats import E4M3, E5M2
from dsv3_megatron.precision.tiles import decode, quantise, quantise_dequantise
from testing.lanes import examples

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
A = ((torch.arange(1024).view(4, 256) % 37) - 18).float() * 0.1 * torch.tensor([1e-3, 1, 50, 3e4]).view(4, 1)
A = A.bfloat16()


def total(quantised):
    """Return the sum of all bytes."""
    return int(quantised.data.contiguous().view(torch.uint8).long().sum())


# What Transformer Engine's kernels give: one tile x = [a, a/3, -a/1000, 0 ...], scale_inv and the first three bytes.
VECTORS = [
    (1.0, "e4m3", True, 2**-8, (120, 107, 168)),
    (1.0, "e4m3", False, 0.00223214296, (126, 113, 174)),
    (1.0, "e5m2", True, 2**-15, (120, 113, 208)),
    (1.0, "e5m2", False, 1.74386169e-05, (123, 117, 211)),
    (448.0, "e4m3", True, 1.0, (126, 113, 174)),
    (448.0, "e5m2", True, 2**-7, (123, 117, 211)),
    (449.0, "e4m3", True, 2.0, (118, 105, 166)),
    (449.0, "e4m3", False, 1.00223207, (126, 113, 174)),
    (0.1, "e4m3", True, 2**-12, (125, 113, 173)),
    (0.1, "e5m2", False, 1.74386162e-06, (123, 117, 211)),
    (1e-30, "e4m3", True, 3.08148791e-33, (122, 110, 170)),
    (1e-30, "e5m2", True, 2.40741243e-35, (121, 115, 209)),
    (1e-37, "e4m3", True, 2.0**-127, (89, 75, 137)),
    (1e-37, "e4m3", False, 2.93873588e-39, (97, 83, 145)),
    (1e-37, "e5m2", False, 2.93873588e-39, (80, 74, 168)),
    (0.0, "e4m3", True, 1.0, (0, 0, 128)),
]


@pytest.mark.parametrize(("a", "fmt", "power_of_two", "scale_inv", "data"), VECTORS)
def test_a_tile_is_what_transformer_engine_makes_of_it(a, fmt, power_of_two, scale_inv, data):
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([a, a / 3, -a / 1000])
    found = quantise(x, (1, 128), FORMATS[fmt], power_of_two=power_of_two)
    assert found.scale_inv.item() == pytest.approx(scale_inv, rel=2e-7)  # decimals, and one unit in the last place
    assert tuple(found.data.view(torch.uint8)[0, :3].tolist()) == data


def test_bfloat16_limits_the_scale_of_the_tiniest_tile():
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([1e-37, 1e-37 / 3, -1e-40])
    found = quantise(x, (1, 128), power_of_two=False)
    assert found.scale_inv.item() == pytest.approx(2.95026016e-39, rel=1e-6)
    assert found.data.view(torch.uint8)[0, :3].tolist() == [96, 83, 144]


@pytest.mark.parametrize(
    ("x", "tile", "fmt", "power_of_two", "expected"),
    [
        (A, (1, 128), "e4m3", True, 175421),
        (A, (1, 128), "e4m3", False, 179817),
        (A, (1, 128), "e5m2", True, 179711),
        (A, (1, 128), "e5m2", False, 181953),
        (A, (128, 128), "e4m3", True, 104457),
        (A, (128, 1), "e4m3", True, 110021),
        (A[:3, :200], (1, 128), "e4m3", True, 103836),
        (A[:3, :200], (128, 128), "e4m3", True, 75180),
    ],
)
def test_whole_matrices_add_up_to_the_published_bytes(x, tile, fmt, power_of_two, expected):
    assert total(quantise(x, tile, FORMATS[fmt], power_of_two=power_of_two)) == expected


def test_the_rounding_error_of_normal_numbers_is_the_published_one():
    torch.manual_seed(1234)
    x = torch.randn(128, 256)
    for power_of_two, expected in ((True, 0.026662), (False, 0.025701)):
        found = quantise_dequantise(x, (1, 128), power_of_two=power_of_two)
        assert ((found - x).norm() / x.norm()).item() == pytest.approx(expected, abs=1e-6)


def test_nan_stays_and_inf_saturates():
    x = torch.zeros(2, 128)
    x[0, :6] = torch.tensor([math.nan, 1, -2, 0.3, 1e-9, -0.0])
    x[1, :6] = torch.tensor([math.inf, 1, -2, 1000, 1e-3, -math.inf])
    found = quantise(x, (1, 128))
    assert found.scale_inv.flatten().tolist() == [2**-7, 1.0]
    assert found.data.view(torch.uint8)[:, :6].tolist() == [[127, 112, 248, 98, 0, 128], [126, 56, 192, 126, 1, 254]]
    back = found.dequantise()
    assert back[0, 0].isnan() and back[1, :6].tolist() == [448, 1, -2, 448, 2**-9, -448]


def test_ties_go_to_the_even_neighbour():
    numbers = [448, 17, 18, 19, -17, 27, 2**-9, 2**-10, 1.5 * 2**-9, 2.5 * 2**-9, 440]
    expected = [448, 16, 18, 20, -16, 28, 2**-9, 0, 2**-8, 2**-8, 448]
    x = torch.zeros(1, 128)
    x[0, : len(numbers)] = torch.tensor(numbers)
    assert quantise_dequantise(x, (1, 128))[0, : len(numbers)].tolist() == expected


@pytest.mark.parametrize("fmt", FORMATS.values())
def test_every_finite_byte_decodes_as_torch_decodes_it(fmt):
    data = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    data = data[data.float().isfinite()]
    assert torch.equal(decode(data, fmt, finite=True), data.float())


def slow(x, tile, fmt, power_of_two):
    """Return the dequantised tensor, tile by tile, from the rules as written."""
    out = torch.empty(x.shape, dtype=torch.float32)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            part = x[i : i + tile[0], j : j + tile[1]].float()
            amax = part.abs().max().item()
            scale = torch.tensor(1.0 if amax == 0 else fmt.largest) / (torch.tensor(amax) if amax else 1.0)
            scale = scale.clamp(max=torch.finfo(x.dtype).max)
            if power_of_two:
                scale = torch.tensor(2.0) ** (torch.frexp(scale).exponent - 1)
            q = (part * scale).clamp(-fmt.largest, fmt.largest).to(fmt.dtype)
            out[i : i + tile[0], j : j + tile[1]] = q.float() * (1 / scale)
    return out


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(deadline=None, max_examples=examples(40))
@given(
    shapes,
    st.sampled_from([(1, 128), (128, 1), (128, 128)]),
    st.sampled_from(list(FORMATS.values())),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(-20, 20),
    st.integers(0, 2**32),
)
def test_any_shape_equals_the_slow_reference(shape, tile, fmt, power_of_two, dtype, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator).pow(3) * 2.0**exponent).to(dtype)
    found = quantise_dequantise(x, tile, fmt, power_of_two=power_of_two)
    assert torch.equal(found, slow(x, tile, fmt, power_of_two))


@settings(deadline=None, max_examples=examples(40))
@given(shapes, st.sampled_from([(1, 128), (128, 128)]), st.integers(0, 2**32))
def test_what_was_quantised_with_powers_of_two_stays_as_it_is(shape, tile, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    once = quantise_dequantise(x, tile)
    assert torch.equal(quantise_dequantise(once, tile), once)


def test_experts_are_quantised_each_for_itself():
    x = torch.randn(3, 200, 130)
    whole = quantise_dequantise(x, (128, 128))
    for expert, matrix in enumerate(x):
        assert torch.equal(whole[expert], quantise_dequantise(matrix, (128, 128)))


def test_the_whole_matrix_can_be_one_tile():
    x = torch.randn(5, 300)
    found = quantise(x, (0, 0))
    assert found.scale_inv.shape == (1, 1)
    assert torch.equal(found.dequantise(), slow(x, (5, 300), E4M3, True))
