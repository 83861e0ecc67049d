"""Weights in the published FP8 format."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.precision.weights import dequantise_weight, quantise_weight, requantise_weight, tile_of_scales
from testing.lanes import examples


def test_a_block_is_its_numbers_times_its_scale():
    torch.manual_seed(0)
    weight = torch.randn(300, 576) * torch.logspace(-3, 3, 300).view(-1, 1)
    data, scale_inv = quantise_weight(weight)
    assert data.dtype is torch.float8_e4m3fn and scale_inv.shape == (3, 5)
    restored = dequantise_weight(data, scale_inv, torch.float32)
    for i in range(3):
        for j in range(5):
            part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            assert torch.equal(restored[part], data[part].float() * scale_inv[i, j])
            assert scale_inv[i, j].item() == pytest.approx(weight[part].abs().max().item() / 448, rel=1e-6)
            assert (restored[part] - weight[part]).abs().max() <= weight[part].abs().max() / 28 + 1e-9


def test_power_of_two_scales_store_what_training_multiplied_with():
    torch.manual_seed(0)
    weight = torch.randn(256, 384)
    data, scale_inv = quantise_weight(weight, power_of_two=True)
    product, _ = Fp8Products(Fp8Settings()).forward(torch.eye(384), weight, None)
    assert torch.equal(dequantise_weight(data, scale_inv, torch.float32), product.t())


def test_stacked_experts_are_quantised_one_by_one():
    weight = torch.randn(3, 130, 200)
    data, scale_inv = quantise_weight(weight)
    for expert in range(3):
        alone = quantise_weight(weight[expert])
        assert torch.equal(data[expert].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scale_inv[expert], alone[1])


def test_scales_of_another_grid_are_refused():
    data, scale_inv = quantise_weight(torch.randn(300, 576))
    with pytest.raises(ValueError, match=r"\(3, 5\) blocks expected"):
        dequantise_weight(data, scale_inv[:2])


@st.composite
def scaled(draw):
    """Return (numbers, scales as stored, block or None, scale of every element)."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 99)))
    data = torch.randn(rows, columns).mul(60).to(torch.float8_e4m3fn)
    kind = draw(st.sampled_from(["block", "row", "row of one axis", "matrix", "matrix of no axis"]))
    block = (draw(st.integers(1, 50)), draw(st.integers(1, 50))) if kind == "block" else None
    shape = {
        "block": (math.ceil(rows / block[0]), math.ceil(columns / block[1])) if block else (),
        "row": (rows, 1),
        "row of one axis": (rows,),
        "matrix": (1,),
        "matrix of no axis": (),
    }[kind]
    stored = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]))
    scales = torch.rand(shape).add(0.1).to(stored)
    tile = block or ((1, columns) if kind.startswith("row") else (rows, columns))
    return data, scales, block, tile


@given(scaled())
@settings(max_examples=examples(150), deadline=None)
def test_numbers_are_multiplied_by_the_scale_of_their_tile(case):
    data, scales, block, tile = case
    shape = tuple(scales.shape)
    found = tile_of_scales(tuple(data.shape), shape, block, or_coarser=block is None)
    values = dequantise_weight(data, scales, torch.float32, tile=found)
    across = -(-data.shape[1] // tile[1])
    flat = scales.float().reshape(-1)
    for i in range(data.shape[0]):
        for j in range(data.shape[1]):
            scale = flat[i // tile[0] * across + j // tile[1]]
            assert values[i, j] == data[i, j].float() * scale


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2), (256, 2), (2, 2, 1), (300,), (0,)])
def test_scales_that_no_tile_has_are_refused(shape):
    with pytest.raises(ValueError, match="do not fit"):
        tile_of_scales((256, 300), shape, (128, 128), or_coarser=False)
    with pytest.raises(ValueError, match="do not fit"):
        tile_of_scales((256, 300), shape, None, or_coarser=True)
    assert tile_of_scales((256, 300), (2, 3), (128, 128), or_coarser=True) == (128, 128)


def e4m3(*shape):
    """Return finite E4M3 numbers of every size, zeros and subnormals among them, some blocks without large ones."""
    bits = torch.randint(0, 127, shape, dtype=torch.uint8) | (torch.randint(0, 2, shape, dtype=torch.uint8) << 7)
    return bits.view(torch.float8_e4m3fn)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["power_of_two", "float"]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([1.0, 2.0, 64.0, 0.0]),
    st.integers(0, 999),
)
@settings(max_examples=examples(100), deadline=None)
def test_what_was_published_is_published_again_to_the_bit(shape, kind, dtype, smaller, seed):
    """Also of blocks that no rule would scale so: of small numbers alone, of zeros, with any exponent."""
    torch.manual_seed(seed)
    grid = (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    data = e4m3(*shape)
    data = (data.float() / smaller if smaller else data.float() * 0).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-110, 100, grid) * (1 if kind == "power_of_two" else torch.rand(grid) + 1)
    weight = dequantise_weight(data, scales, dtype)
    again, kept = requantise_weight(weight, scales, power_of_two=kind == "power_of_two")
    assert torch.equal(again.view(torch.uint8), data.view(torch.uint8)) and torch.equal(kept, scales)


def test_a_block_that_was_trained_gets_a_scale_of_its_own_and_the_others_keep_theirs():
    torch.manual_seed(0)
    data, scales = e4m3(200, 300), torch.rand(2, 3) + 1
    weight = dequantise_weight(data, scales, torch.float32)
    weight[150, 10] *= 1.01
    again, found = requantise_weight(weight, scales)
    fresh, own = quantise_weight(weight)
    changed = torch.zeros(200, 300, dtype=torch.bool)
    changed[128:, :128] = True
    expected = torch.where(changed, fresh.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(again.view(torch.uint8), expected)
    assert found[1, 0] == own[1, 0] and torch.equal(found.view(-1)[[0, 1, 2, 4, 5]], scales.view(-1)[[0, 1, 2, 4, 5]])


def test_numbers_alone_do_not_tell_their_scale():
    """Why published scales are kept: both of these are what a rule gives, for weights a little above 224 and at 448."""
    numbers = torch.full((128, 128), 448.0)
    halves = (numbers / 2).to(torch.float8_e4m3fn)
    one = dequantise_weight(numbers.to(torch.float8_e4m3fn), torch.tensor([[1.0]]))
    assert torch.equal(one, dequantise_weight(halves, torch.tensor([[2.0]])))
    data, _ = quantise_weight(one, power_of_two=True)
    assert not torch.equal(data.view(torch.uint8), halves.view(torch.uint8))
