"""How long a kernel takes on a GPU that nobody has here: peaks, times the shares of them that others have measured.

The shares and their sources: :mod:`~dsv3_megatron.planning.time.efficiency`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dsv3_megatron.planning.time.efficiency import EFFICIENCIES, Efficiency
from dsv3_megatron.settings import ClusterSettings

Format = Literal["fp8", "bf16", "fp32"]

# DeepGEMM's README, first release: FP8 products with fine-grained scales on an H800 (132 SMs), M, N, K -> TFLOP/s.
# The rows with training's M; those with M = 64 and 128 are bound by memory.
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
    def efficiency(self) -> Efficiency:
        """What its architecture's kernels reach."""
        return EFFICIENCIES[self.cluster.architecture]

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
        if form == "fp8" and self.efficiency.fp8_at_7168 is not None:
            most = self.efficiency.fp8_at_7168 * (1 + half / 7168)
        tiles = groups * math.ceil(m / _TILE) * math.ceil(n / _TILE)
        filled = groups * (m / _TILE) * (n / _TILE) / (math.ceil(tiles / sms) * sms)
        rate = self.peak(form) * self._share_of_sms * most / (1 + half / k) * min(1.0, filled)
        size = {"fp8": 1, "bf16": 2, "fp32": 4}[form]
        traffic = groups * (size * (m * k + n * k) + 2 * m * n)
        return max(2.0 * groups * m * n * k / rate, self.memory(traffic))

    def weight_gradient(self, m: float, n: float, k: float, form: Format, *, groups: int = 1) -> float:
        """Return the time of products [m, k] x [k, n] that are added to float32 gradients."""
        share = self.efficiency.fp8_weight_gradient
        if form == "fp8" and share is not None:
            return 2.0 * groups * m * n * k / (self.peak(form) * self._share_of_sms * share)
        return self.product(m, n, k, form, groups=groups) + self.memory(8 * groups * m * n)

    def cast(self, nbytes: float) -> float:
        """Return the time to quantise: read, find scales, write, transposed or not."""
        return nbytes / (self.cluster.memory_terabytes_per_second * 1e12 * self.efficiency.cast)

    def attention(self, pairs: float, operations_of_pair: float) -> float:
        """Return the time of attention's forward over ``pairs`` of query and key, summed over heads, causal halves
        already left out; ``operations_of_pair``: two for every channel of a key and of a value."""
        return self._attention(pairs * operations_of_pair, self.efficiency.attention_forward(operations_of_pair))

    def attention_backward(self, pairs: float, operations_of_pair: float) -> float:
        """Return the time of attention's backward, its own recomputation of the scores included."""
        return self._attention(pairs * operations_of_pair, self.efficiency.attention_backward)

    def _attention(self, operations: float, share: float) -> float:
        return operations / (self.peak("bf16") * self._share_of_sms * share)

    def norm_backward(self, nbytes: float) -> float:
        """Return the time of RMSNorm's backward, which reads input and gradient and writes one."""
        return nbytes / (self.cluster.memory_terabytes_per_second * 1e12 * self.efficiency.norm_backward)

    def memory(self, nbytes: float) -> float:
        """Return the time to move bytes to and from the device's memory. A few SMs less do not slow it."""
        return nbytes / (self.cluster.memory_terabytes_per_second * 1e12 * self.efficiency.memory)
