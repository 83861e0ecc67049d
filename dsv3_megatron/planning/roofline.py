"""How long a kernel takes on a GPU that nobody has here: hardware peaks times efficiencies that others have measured.

Every efficiency is fitted to a published table and is a share of a peak of the cluster file, so that it carries over to
GPUs with other peaks; that it does is an assumption. No number here was chosen to hit a step time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dsv3_megatron.recipe import ClusterSettings

Format = Literal["fp8", "bf16", "fp32"]

# DeepGEMM's README, first release: FP8 products with fine-grained scales on an H800 (132 SMs), M, N, K -> TFLOP/s.
# The rows with training's M; those with M = 64 and 128 are bound by memory and give MEMORY_SHARE.
DEEPGEMM = (
    (4096, 2112, 7168, 1058),
    (4096, 24576, 1536, 990),
    (4096, 32768, 512, 590),
    (4096, 7168, 16384, 1358),
    (4096, 4096, 7168, 1304),
    (4096, 7168, 2048, 1025),
    (4 * 8192, 4096, 7168, 1297),
    (4 * 8192, 7168, 2048, 1099),
    (8 * 4096, 4096, 7168, 1288),
    (8 * 4096, 7168, 2048, 1093),
)
_H800_SMS, _H800_FP8 = 132, 1979.0
# The fastest memory-bound row of that table: 2,668 of 3,350 GB/s.
MEMORY_SHARE = 2668 / 3350
# FlashAttention-3 on an H100, head dimension 128, causal, 4K tokens: 579 TFLOP/s forward (arXiv 2407.08608, figure 5;
# torch's benchmark suite measured 590). Backward: figure 6 has 542 without the causal mask only; the mask is taken to
# cost what it costs the forward there, 579 of 638.
ATTENTION_FORWARD, ATTENTION_BACKWARD = 579 / 989.5, 542 * 579 / 638 / 989.5
# DeepSeek's published profile (deepseek-ai/profile-data, train.json: 4,096 tokens, 112 of an H800's 132 SMs), a layer:
# 4.78e12 operations of FP8 weight gradients, added to float32, in 8.2 ms; 7.0e9 bytes of casts in 4.2 ms. No table of
# microbenchmarks has these two, so the profile is no test of them.
WEIGHT_GRADIENT_SHARE = 4.78e12 / 8.2e-3 / (1979e12 * 112 / 132)
CAST_SHARE = 7.0e9 / 4.2e-3 / 3350e9
_TILE = 128


@lru_cache
def _fit() -> tuple[float, float]:
    """Return (share of the peak at endless K, K at which half of that is lost to starting and ending a tile).

    Time per operation is linear in 1/K; least squares over the table, partly filled last waves of tiles taken out.
    """
    points = [(1 / k, _waves(m, n, _H800_SMS) / rate) for m, n, k, rate in DEEPGEMM]
    # Weighted by rate^2, so that relative errors count alike.
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points)) / total
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points))
    slope /= sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points))
    start = mean_y - slope * mean_x
    return 1 / start / _H800_FP8, slope / start


def _waves(m: float, n: float, sms: int) -> float:
    """Return the share of SM time that tiles of an [m, n] output fill: the last wave is rarely full."""
    tiles = math.ceil(m / _TILE) * math.ceil(n / _TILE)
    return tiles / (math.ceil(tiles / sms) * sms)


@dataclass(frozen=True)
class Device:
    """A GPU's kernels, in seconds. ``busy_sms``: SMs that communication occupies meanwhile."""

    cluster: ClusterSettings
    busy_sms: int = 0

    @property
    def _share_of_sms(self) -> float:
        return (self.cluster.sms - self.busy_sms) / self.cluster.sms

    def peak(self, form: Format) -> float:
        """Return the floating-point operations a second of a format; BF16's where a GPU has no FP8."""
        peaks = self.cluster.peak_tflops
        return 1e12 * (peaks[form] if form in peaks else peaks["bf16"])

    def product(self, m: float, n: float, k: float, form: Format, *, groups: int = 1) -> float:
        """Return the time of ``groups`` products [m, k] x [k, n] run as one kernel."""
        if not m * n * k:
            return 0.0
        sms = self.cluster.sms - self.busy_sms
        most, half = _fit()
        tiles = groups * math.ceil(m / _TILE) * math.ceil(n / _TILE)
        filled = groups * (m / _TILE) * (n / _TILE) / (math.ceil(tiles / sms) * sms)
        rate = self.peak(form) * self._share_of_sms * most / (1 + half / k) * min(1.0, filled)
        size = {"fp8": 1, "bf16": 2, "fp32": 4}[form]
        traffic = groups * (size * (m * k + n * k) + 2 * m * n)
        return max(2.0 * groups * m * n * k / rate, self.memory(traffic))

    def weight_gradient(self, m: float, n: float, k: float, form: Format, *, groups: int = 1) -> float:
        """Return the time of products [m, k] x [k, n] that are added to float32 gradients."""
        if form == "fp8":
            return 2.0 * groups * m * n * k / (self.peak(form) * self._share_of_sms * WEIGHT_GRADIENT_SHARE)
        return self.product(m, n, k, form, groups=groups) + self.memory(8 * groups * m * n)

    def cast(self, nbytes: float) -> float:
        """Return the time to quantise: read, find scales, write, transposed or not."""
        return nbytes / (self.cluster.memory_terabytes_per_second * 1e12 * CAST_SHARE)

    def attention(self, operations: float, *, backward: bool = False) -> float:
        """Return the time of attention's products, ``operations`` of them, causal halves already left out."""
        share = ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
        return operations / (self.peak("bf16") * self._share_of_sms * share)

    def memory(self, nbytes: float) -> float:
        """Return the time to move bytes to and from the device's memory. A few SMs less do not slow it."""
        return nbytes / (self.cluster.memory_terabytes_per_second * 1e12 * MEMORY_SHARE)
