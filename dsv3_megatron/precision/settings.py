"""The ``precision`` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class Fp8Settings(BaseModel):
    """The FP8 policy of linear layers (arXiv 2412.19437 section 3.3). The defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="e4m3 everywhere, or hybrid: E5M2 for gradients")
    activation_tile: Literal["1x128", "128x128", "tensor"] = "1x128"
    weight_tile: Literal["128x128", "tensor"] = "128x128"
    gradient_tile: Literal["1x128", "128x128", "tensor"] = "1x128"
    power_of_two_scales: bool = True
    wgrad_operands: Literal["requantised", "retiled"] = Field(
        "requantised",
        description="the weight gradient's X: requantised from high precision in forward (Transformer Engine), or "
        "retiled in backward from the 1x128 copy that forward used (the paper)",
    )
    accumulation: Literal["fp32", "14bit", "14bit_promoted"] = Field(
        "fp32", description="how products add up; the others emulate a tensor core, for studying only"
    )
    high_precision_layers: tuple[NonNegativeInt, NonNegativeInt] = Field(
        (0, 0), description="how many first and last decoder layers stay out of FP8"
    )


class PrecisionSettings(BaseModel):
    """Formats of parameters, optimizer states and matrix products."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["fp32", "bf16", "fp8"] = "fp32"
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="format of the weights that forward reads")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="format of AdamW's two moments")
    fp8: Fp8Settings | None = Field(None, description="null = linear layers multiply in the parameters' format")
