"""The ``checkpoint`` section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class CheckpointSettings(BaseModel):
    """When to save and how much to keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: NonNegativeInt = Field(0, description="save every so many steps; 0 = only at the end of the run")
    keep: PositiveInt = Field(2, description="newest checkpoints kept; older ones are removed after a save")
    asynchronous: bool = Field(False, description="write while training goes on")
