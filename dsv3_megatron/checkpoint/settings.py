"""The ``checkpoint`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("it must be the same folder in every process; write it from / on, such as /dev/shm")
    return path


class CheckpointSettings(BaseModel):
    """When to save, how much to keep, where to start from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: NonNegativeInt = Field(0, description="save every so many steps, and at the end; 0 = not by steps")
    every_minutes: NonNegativeFloat | Literal["auto"] = Field(
        0.0,
        description="save also so many minutes after the last save began, by rank 0's clock; 0 = not by time; "
        "auto: the plan's best interval (docs/checkpoints.md)",
    )
    keep: PositiveInt = Field(2, description="newest checkpoints kept; older ones are removed after a save")
    keep_every_steps: NonNegativeInt = Field(0, description="also keep every checkpoint of a multiple of so many steps")
    asynchronous: bool = Field(False, description="write while training goes on (costs a copy of the state in RAM)")
    load: str | None = Field(
        None, description="checkpoint folder to start from while the run has none of its own; damaged = refused"
    )
    memory_every_steps: NonNegativeInt = Field(
        0, description="also keep the state in host memory, and a copy on another node, every so many steps; 0 = never"
    )
    memory_path: Annotated[str, AfterValidator(_absolute)] = Field(
        "/dev/shm", description="folder of every node for that: of its memory, and there after a process has ended"
    )

    @property
    def interval_seconds(self) -> float:
        """The time between saves; 0 = not by time. Of ``auto``, what was planned must have taken its place."""
        assert self.every_minutes != "auto", "launcher.pretrain puts the planned interval in its place"
        return 60 * float(self.every_minutes)
