"""Weights in the published FP8 format."""

import pytest
import torch

from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.precision.weights import dequantise_weight, quantise_weight


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
