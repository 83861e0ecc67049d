"""The ``optim`` section of a recipe: batch, optimizer, and everything that changes over the run, as phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from parallel.units import parse_count


class Phase(BaseModel):
    """One piece of a curve over tokens consumed.

    A phase starts where the one before it ended, in tokens and in value (the first starts at 0 tokens and value 0),
    unless ``at`` names its own value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    until: str | int | float = Field(description="end of the phase: tokens ('10T') or steps ('2000 steps')")
    shape: Literal["linear", "cosine", "constant"] = Field("constant", description="how the value moves")
    to: NonNegativeFloat | None = Field(None, description="value at the end of a linear or cosine phase")
    at: NonNegativeFloat | None = Field(None, description="value at the start, where it is not the last phase's end")

    @field_validator("until", mode="before")  # before true becomes 1
    @classmethod
    def _readable(cls, until: object) -> object:
        if isinstance(until, str | int | float):
            parse_count(until.removesuffix("steps") if isinstance(until, str) else until)
        return until

    @property
    def in_steps(self) -> bool:
        """True when ``until`` counts optimizer steps, as the paper counts the warmup."""
        return isinstance(self.until, str) and self.until.endswith("steps")

    @property
    def end(self) -> int:
        """``until`` as a number, in tokens or in steps."""
        return parse_count(self.until.removesuffix("steps") if isinstance(self.until, str) else self.until)


Curve = Annotated[
    NonNegativeFloat | tuple[Phase, ...], Field(union_mode="left_to_right", description="a number, or a list of phases")
]
BatchCurve = Annotated[
    PositiveInt | tuple[Phase, ...], Field(union_mode="left_to_right", description="a number, or a list of phases")
]


Coefficients = tuple[float, float, float]
PUBLISHED: Coefficients = (3.4445, -4.7750, 2.0315)


def _largest_value(coefficients: Coefficients, steps: int) -> float:
    """Return how large singular values between 0 and 1 become in so many Newton-Schulz steps; inf: they diverge."""
    a, b, c = coefficients
    largest = 0.0
    for start in range(1, 65):
        s = start / 64
        for _ in range(steps):
            s = s * (a + s * s * (b + s * s * c))
            if abs(s) > 1e6:
                return float("inf")
        largest = max(largest, abs(s))
    return largest


class MuonSettings(BaseModel):
    """Muon, of every matrix that ``optim.matrices`` names (arXiv 2502.16982); AdamW's keys hold for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="how much of the momentum a step keeps")
    nesterov: bool = Field(
        True, description="orthogonalise gradient and momentum mixed, as published, not momentum alone"
    )
    steps: Annotated[int, Field(ge=1, le=50)] = Field(5, description="Newton-Schulz steps")
    coefficients: Coefficients = Field(PUBLISHED, description="of a step: a s + b s^3 + c s^5 for a singular value s")
    scale: PositiveFloat = Field(
        0.2,
        description="an update of [n, m] is times scale x sqrt(max(n, m)); 0.2: about as large as AdamW's, whose "
        "learning rate then serves",
    )
    arithmetic: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="dtype of Newton-Schulz and of what ranks exchange for it; auto: bf16 on GPUs, fp32 on CPUs"
    )
    query: Literal["whole", "head"] = Field(
        "whole", description="q_b (or q) as one matrix, as published, or one for each head (GLM-5)"
    )
    key_value: Literal["whole", "parts", "head"] = Field(
        "whole", description="kv_b as one matrix, as published; keys' and values' part; or both for each head (GLM-5)"
    )
    output: Literal["whole", "head"] = Field("whole", description="o as one matrix, as published, or one for each head")
    router: Literal["muon", "adamw"] = Field("muon", description="what updates the router's matrix")

    def arithmetic_on(self, device: str) -> Literal["bf16", "fp32"]:
        """Return the dtype of Newton-Schulz, and of what ranks exchange for it, on a kind of device."""
        if self.arithmetic == "auto":
            return "fp32" if device == "cpu" else "bf16"
        return self.arithmetic

    @field_validator("coefficients")
    @classmethod
    def _bring_near_one(cls, coefficients: Coefficients, info: ValidationInfo) -> Coefficients:
        """Refuse a typing error that would make an update of zeros, or of numbers that are not finite."""
        steps = info.data.get("steps")  # missing where it is itself wrong
        if steps is not None and not 0.3 < (largest := _largest_value(coefficients, steps)) < 3:
            raise ValueError(
                f"{steps} steps bring the largest singular values to {largest:.2g}, away from one; "
                f"published are {list(PUBLISHED)}"
            )
        return coefficients


class OptimSettings(BaseModel):
    """AdamW or Muon, and the regime (arXiv 2412.19437 section 4.2)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for matrices, AdamW for embedding, head and vectors (docs/optimizers.md)"
    )
    muon: MuonSettings = Field(default_factory=MuonSettings, description="used where optim.name is muon")
    micro_batch: PositiveInt = Field(1, description="sequences of one microbatch on one data-parallel rank")
    global_batch: BatchCurve = Field(16, description="sequences of one optimizer step")
    batch_multiple: PositiveInt = Field(1, description="a ramping global batch is rounded down to a multiple of this")
    learning_rate: Curve = Field(2.2e-4, description="learning rate of AdamW, and of Muon")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="decoupled decay of weights a step, times the learning rate"
    )
    betas: tuple[
        Annotated[float, Field(ge=0, lt=1)],
        Annotated[float, Field(ge=0, lt=1)],
    ] = Field((0.9, 0.95), description="how much of the first and the second moment a step keeps")
    epsilon: PositiveFloat = Field(1e-8, description="Adam's denominator floor (the paper gives none)")
    clip: PositiveFloat = Field(1.0, description="largest norm of the whole gradient; longer ones are scaled down")
    qk_clip: PositiveFloat | None = Field(
        None, description="attention logit above which a head's query and key projections are scaled down; null = never"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="keep an average of the weights in host memory: share of it a step keeps; null = none"
    )
    mtp_weight: Curve = Field(0.3, description="weight of the multi-token-prediction loss (lambda)")
    mtp_depth_decay: Curve = Field(
        1.0, description="weight of an MTP depth relative to the depth before it; 1 = all alike, as in the paper"
    )
    bias_speed: Curve = Field(0.001, description="router-bias update speed per step (gamma)")
    balance_weight: Curve = Field(0.0001, description="weight of the sequence-wise balance loss (alpha)")

    @field_validator("qk_clip", mode="before")  # before true becomes a threshold of 1
    @classmethod
    def _no_switch(cls, qk_clip: object) -> object:
        if isinstance(qk_clip, bool):
            raise ValueError("it is not a switch; give a logit, such as 100, or null for none")
        return qk_clip
