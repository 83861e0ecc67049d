"""The ``precision`` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from parallel.errors import RecipeError

PAPER_TILES = ("1x128", "128x128", "1x128")


class Fp8Settings(BaseModel):
    """The FP8 policy of linear layers (arXiv 2412.19437 section 3.3). The defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="e4m3 everywhere, or hybrid: E5M2 for gradients")
    activation_tile: Literal["1x128", "128x128", "tensor"] = Field(
        "1x128", description="values of activations that share a scale"
    )
    weight_tile: Literal["128x128", "tensor"] = Field("128x128", description="values of weights that share a scale")
    gradient_tile: Literal["1x128", "128x128", "tensor"] = Field(
        "1x128", description="values of output gradients that share a scale"
    )
    power_of_two_scales: bool = Field(True, description="scales are powers of two: scaling itself rounds nothing")
    scaling: Literal["current", "delayed"] = Field(
        "current", description="scale from this tensor's amax, or from the largest of earlier ones (tensor tiles only)"
    )
    delayed_history: PositiveInt = Field(16, description="how many earlier amaxes delayed scaling looks back on")
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
    dispatch: Literal["high", "e4m3"] = Field(
        "e4m3", description="tokens sent to experts, and gradients sent back to them, in FP8 1x128; combine never is"
    )
    swiglu_cache: Literal["high", "e4m3"] = Field(
        "e4m3", description="what SwiGLU keeps for backward: its input in FP8 1x128, its output computed again"
    )
    attention_output_cache: Literal["high", "once", "e5m6"] = Field(
        "e5m6",
        description="the input of the linear after attention: e5m6 or once (high precision) = one copy for its and the "
        "attention's backward; high = the attention's copy, and the linear's in FP8",
    )
    hold_weights: bool = Field(False, description="parameters of linear layers exist in FP8 only (te backend)")

    @property
    def tiles(self) -> tuple[str, str, str]:
        """Tiles of activations, weights and gradients."""
        return self.activation_tile, self.weight_tile, self.gradient_tile

    def check(self) -> None:
        """Raise RecipeError where two values contradict each other."""
        if self.scaling == "delayed" and set(self.tiles) != {"tensor"}:
            raise RecipeError(
                f"precision.fp8.scaling = delayed needs one scale a tensor, but activation, weight and gradient tiles "
                f"are {', '.join(self.tiles)}; set all three tiles to tensor, or scaling=current"
            )
        if self.wgrad_operands == "retiled" and self.activation_tile != "1x128":
            raise RecipeError(
                f"precision.fp8.wgrad_operands = retiled re-cuts 1x128 tiles, but activation_tile = "
                f"{self.activation_tile}; set wgrad_operands=requantised"
            )


class PrecisionSettings(BaseModel):
    """Formats of parameters, optimizer states and matrix products."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["fp32", "bf16", "fp8"] = Field("fp32", description="the kind of precision; set by precision=NAME")
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="format of the weights that forward reads")
    moments: Literal["fp32", "bf16"] = Field("fp32", description="format of AdamW's two moments and Muon's momentum")
    fp8: Fp8Settings | None = Field(None, description="null = linear layers multiply in the parameters' format")

    @property
    def caches_swiglu(self) -> bool:
        """Whether SwiGLU keeps its input in FP8, and is computed again from there."""
        return self.fp8 is not None and self.fp8.swiglu_cache == "e4m3"

    @model_validator(mode="after")
    def _named_as_it_is(self) -> PrecisionSettings:
        """A key of FP8 set on top of another precision would switch FP8 on under the other's name."""
        if (self.name == "fp8") != (self.fp8 is not None):
            state = "null" if self.fp8 is None else "set"
            raise ValueError(
                f"precision.name = {self.name}, but precision.fp8 is {state}; take precision=fp8 or leave it"
            )
        return self
