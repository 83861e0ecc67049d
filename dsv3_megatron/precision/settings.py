"""The ``precision`` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Fp8Settings(BaseModel):
    """The FP8 policy of linear layers (arXiv 2412.19437 section 3.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="e4m3 everywhere, or hybrid: E5M2 for gradients")
    activation_tile: Literal["1x128", "128x128", "tensor"] = "1x128"
    weight_tile: Literal["128x128", "tensor"] = "128x128"
    gradient_tile: Literal["1x128", "128x128", "tensor"] = "1x128"
    power_of_two_scales: bool = True


class PrecisionSettings(BaseModel):
    """Formats of parameters, optimizer states and matrix products."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["fp32", "bf16", "fp8"] = "fp32"
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="format of the weights that forward reads")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="format of AdamW's two moments")
    fp8: Fp8Settings | None = Field(None, description="null = linear layers multiply in the parameters' format")
