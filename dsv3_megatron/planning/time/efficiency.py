"""What share of a GPU's peaks kernels reach, by architecture: from published benchmarks of kernels, all named.

Every number is a share of a peak of the cluster file, so that it carries over to GPUs of the same architecture with
other peaks; that it does is an assumption. None was chosen to hit a step time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["hopper", "blackwell"]


@dataclass(frozen=True)
class Efficiency:
    """Shares of peaks that one architecture's kernels reach.

    Attributes:
        fp8_at_7168: FP8 products with K = 7168, share of the FP8 peak; None = as the fit over DeepGEMM's table says
            (:mod:`~dsv3_megatron.planning.time.roofline`), whose loss at small K holds for every architecture.
        fp8_weight_gradient: products added to float32 gradients, share of the FP8 peak; None = as other products, and
            the memory that adding takes.
        cast: reading, scaling and writing, share of the memory's peak.
        attention: forward, causal, by operations a query-key pair: two points, a line in time between and beyond them.
        attention_backward: share of the BF16 peak.
        memory: kernels that only move bytes, share of the memory's peak.
        norm_backward: RMSNorm's, which also sums the gain's gradient over rows, share of the memory's peak.
    """

    fp8_at_7168: float | None
    fp8_weight_gradient: float | None
    cast: float
    attention: tuple[tuple[float, float], tuple[float, float]]
    attention_backward: float
    memory: float
    norm_backward: float

    def attention_forward(self, operations_of_pair: float) -> float:
        """Return the share of the BF16 peak for heads of other sizes: exponentials cost what they cost, so that the
        time of a pair is a constant and its operations."""
        (small, low), (large, high) = self.attention
        slope = (large / high - small / low) / (large - small)
        return operations_of_pair / (small / low + slope * (operations_of_pair - small))


_H100_BF16, _H100_FP8, _H100_MEMORY = 989.5, 1979.0, 3350.0
# FlashAttention-3 on an H100, causal, 4K tokens, TFLOP/s forward with head dimensions 128 and 256 (arXiv 2407.08608,
# figure 5; torch's benchmark suite measured 590 for the first).
_FA3 = ((4 * 128, 579 / _H100_BF16), (4 * 256, 612 / _H100_BF16))
# The fastest memory-bound row of DeepGEMM's README: 2,668 of 3,350 GB/s.
_MEMORY = 2668 / _H100_MEMORY

HOPPER = Efficiency(
    fp8_at_7168=None,
    # DeepSeek's published profile (deepseek-ai/profile-data, train.json: 4,096 tokens, 112 of an H800's 132 SMs), a
    # layer: 4.78e12 operations of FP8 weight gradients, added to float32, in 8.2 ms; 7.0e9 bytes of casts in 4.2 ms. No
    # table of microbenchmarks has these two, so the profile is no test of them. Hopper multiplies by block scales on
    # its CUDA cores, which is why a product scaled along both operands is so far below the peak.
    fp8_weight_gradient=4.78e12 / 8.2e-3 / (_H100_FP8 * 1e12 * 112 / 132),
    cast=7.0e9 / 4.2e-3 / (_H100_MEMORY * 1e9),
    attention=_FA3,
    # Figure 6 has 542 without the causal mask only; the mask is taken to cost what it costs the forward, 579 of 638.
    attention_backward=542 * 579 / 638 / _H100_BF16,
    memory=_MEMORY,
    # The middle of three kernels on an H100, BF16, 33.6 million numbers, of which two are read and one is written:
    # torch.nn.RMSNorm 0.334 ms and Liger's Triton 0.302 ms (linkedin/Liger-Kernel, benchmark/data, megatron_rms_norm),
    # Liger's CuTe 0.088 ms (the same, pull request 1462).
    norm_backward=3 * 2 * 4096 * 8192 / 0.302e-3 / (_H100_MEMORY * 1e9),
)
# FlashMLA's README: up to 1,460 TFLOP/s forward and 1,000 backward on a B200 (peak 2,250), heads of 192 and 128. A
# causal 4K loses as much of that as FlashAttention-3 does between its best, 648, and a causal 4K, 579.
_B200_BF16, _CAUSAL_4K = 2250.0, 579 / 648
_FLASH_MLA = 1460 * _CAUSAL_4K / _B200_BF16

BLACKWELL = Efficiency(
    # Grouped MXFP8 products with K = 7168 reach 2,672 TFLOP/s on a GB200 (peak 5,000), says megatron-core's report on
    # DeepSeek-V3 on GB200 NVL72 (NVIDIA/Megatron-LM, docs/discussions).
    fp8_at_7168=2672 / 5000,
    # The same report: tensor cores apply MXFP8's scales themselves, so that these are products like others.
    fp8_weight_gradient=None,
    # 5.24 of 8 TB/s on a B200 for 8192 x 8192 numbers (pytorch/ao pull request 4777).
    cast=5.24 / 8.0,
    attention=((2 * (192 + 128), _FLASH_MLA), (4 * (192 + 128), _FLASH_MLA)),
    attention_backward=1000 * _CAUSAL_4K / _B200_BF16,
    memory=_MEMORY,
    # Liger's CuTe on a B200 (pull request 1462), the one kernel published: 97.4 us both ways less 33.7 forward.
    norm_backward=3 * 2 * 8192 * 4096 / 63.8e-6 / 8e12,
)
EFFICIENCIES: dict[Architecture, Efficiency] = {"hopper": HOPPER, "blackwell": BLACKWELL}
