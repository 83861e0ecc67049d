"""FP8 by torch's block-scaled matmul: operands and scales laid out as torch's own checks ask, and the right numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3_megatron.precision import hopper
from dsv3_megatron.precision.hopper import HopperFp8
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings
from testing.fp8_products import three_products

BF16 = torch.bfloat16
ROOT = Path(__file__).resolve().parents[3]


def by_the_documented_layout(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
    """Return the product as scaled_mm's documentation lays operands and scales out, in float32; check strides."""
    (rows, summed), (again, columns) = a.shape, b.shape
    assert summed == again and a.stride(1) == 1 and b.stride(0) == 1 and summed % 128 == 0
    assert kind_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (rows, summed // 128) and scale_a.stride(0) == 1
    left = a.float() * scale_a.repeat_interleave(128, 1)
    if kind_b == F.ScalingType.BlockWise1x128:
        assert scale_b.shape == (columns, summed // 128) and scale_b.stride(0) == 1
        right = b.float() * scale_b.repeat_interleave(128, 1).t()
    else:
        padded = -(-summed // 128 // 4) * 4
        assert scale_b.shape == (padded, columns // 128) and scale_b.stride() == (1, padded)
        blocks = scale_b[: summed // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
        right = b.float() * blocks
    return (left @ right).to(output_dtype)


@pytest.mark.parametrize("tokens", [256, 200])
def test_the_three_products_are_those_of_the_emulation(monkeypatch, tokens):
    monkeypatch.setattr(F, "scaled_mm", by_the_documented_layout)
    torch.manual_seed(0)
    x, w, dy = torch.randn(tokens, 384).to(BF16), torch.randn(640, 384).to(BF16), torch.randn(tokens, 640).to(BF16)
    settings = Fp8Settings()
    for mine, theirs in zip(
        three_products(HopperFp8(settings), x, w, dy), three_products(Fp8Products(settings), x, w, dy)
    ):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2, atol=1e-2)


def test_torchs_own_checks_accept_the_operands(monkeypatch):
    seen, real = [], F.scaled_mm

    def on_meta(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
        # The kernels exist on a GPU only; the checks of shapes and strides run on tensors without data.
        meta = [t.as_strided(t.shape, t.stride()).to("meta") for t in (a, b, scale_a, scale_b)]
        for t, m in zip((a, b, scale_a, scale_b), meta):
            assert t.stride() == m.stride()
        out = real(meta[0], meta[1], meta[2], kind_a, meta[3], kind_b, output_dtype=output_dtype)
        seen.append(tuple(out.shape))
        return torch.zeros(out.shape, dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", on_meta)
    x, w, dy = torch.randn(256, 384).to(BF16), torch.randn(640, 384).to(BF16), torch.randn(256, 640).to(BF16)
    three_products(HopperFp8(Fp8Settings()), x, w, dy)
    assert seen == [(256, 640), (256, 384), (640, 384)]


def test_experts_and_widths_that_do_not_divide_stay_emulated(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", None)
    x, w, dy = torch.randn(64, 576), torch.randn(100, 576), torch.randn(64, 100)
    three_products(HopperFp8(Fp8Settings()), x, w, dy)
    ends = torch.tensor([30, 64], dtype=torch.int32)
    three_products(HopperFp8(Fp8Settings()), x, torch.randn(2, 128, 576), torch.randn(64, 128), ends)


def test_why_it_is_not_used_is_told():
    assert hopper.why_not(Fp8Settings(), torch.device("cpu")) == "there is no GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")
def test_a_hopper_gpu_gives_the_emulations_products():
    """In a process of its own: this one is prepared for the CPU and shown no GPU."""
    code = "from tests.dsv3_megatron.precision.test_hopper import compare_on_a_gpu; compare_on_a_gpu()"
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if skipped := done.stdout.strip():
        pytest.skip(skipped)


def compare_on_a_gpu():
    """Compare the kernel's products with the emulation's; print why not, where the GPU cannot."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        print("there is no GPU")
        return
    if reason := hopper.why_not(Fp8Settings(), device):
        print(reason)
        return
    torch.manual_seed(0)
    shapes = ((4096, 7168), (1536, 7168), (4096, 1536))
    x, w, dy = (torch.randn(s, device=device).to(BF16) for s in shapes)
    found = three_products(HopperFp8(Fp8Settings()), x, w, dy)
    expected = three_products(Fp8Products(Fp8Settings()), *(t.float() for t in (x, w, dy)))
    for mine, theirs in zip(found, expected):
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert error < 4e-3, error  # BF16 output: 2e-3
