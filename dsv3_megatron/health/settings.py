"""The ``health`` section of a recipe. Apart from its consumer, which needs torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class HealthSettings(BaseModel):
    """Which steps are not taken, and what then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skip_sigma: PositiveFloat | None = Field(
        6.0, description="skip a step whose loss or gradient norm is so many deviations above the mean; null = never"
    )
    skip_window: PositiveInt = Field(128, description="steps that mean and deviation are taken over")
    skip_limit: PositiveInt = Field(10, description="skipped steps in a row after which the run ends or rolls back")
    rollbacks: NonNegativeInt = Field(
        0, description="times a run may go back to its last checkpoint, past the data it failed on; 0 = it ends"
    )
    straggler_every_steps: NonNegativeInt = Field(20, description="look for slow ranks every so many steps; 0 = never")
    straggler_ratio: PositiveFloat = Field(1.3, description="a rank is slow above so many times the median")
