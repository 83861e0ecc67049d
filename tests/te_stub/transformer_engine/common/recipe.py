"""Recipes of Transformer Engine 2.x by name; scales are read from the environment once, at import, as TE does."""

import os
import types

_POWER_OF_TWO = os.getenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1"


class Format:
    """E4M3 for everything, or E5M2 for gradients."""

    E4M3, HYBRID = "e4m3", "hybrid"


class _Recipe:
    def __init__(self, fp8_format=None, **arguments):
        self.format, self.arguments = fp8_format, arguments
        self.name = f"{type(self).__name__}:{fp8_format}"


class DelayedScaling(_Recipe):
    """One scale a tensor, from a history."""


class Float8CurrentScaling(_Recipe):
    """One scale a tensor, from now."""


class Float8BlockScaling(_Recipe):
    """1x128 and 128x128 tiles."""

    fp8_quant_fwd_inp = types.SimpleNamespace(power_2_scale=_POWER_OF_TWO)


class MXFP8BlockScaling(_Recipe):
    """1x32 tiles."""
