"""The ``parallel`` section of a recipe: degrees of parallelism and the pipeline schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ScheduleName = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev", "auto"]
RecomputeName = Literal["norm", "mla_up", "attention", "moe_act", "shared_experts", "mlp", "moe", "full"]


class ParallelSettings(BaseModel):
    """Degrees of parallelism. The data-parallel degree is not a key: it follows from the world size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: PositiveInt = Field(1, description="tensor-parallel ranks (TP); above 1, sequence parallelism is on")
    context: PositiveInt = Field(
        1, description="context-parallel ranks (CP): each holds a part of every sequence, and of the heads in attention"
    )
    expert: PositiveInt = Field(1, description="expert-parallel ranks (EP): each holds n_routed_experts / EP experts")
    expert_tensor: PositiveInt = Field(1, description="tensor-parallel ranks inside an expert")
    pipeline: PositiveInt = Field(1, le=10_000, description="pipeline-parallel ranks (PP)")
    schedule: ScheduleName = Field("1f1b", description="order of forwards and backwards over the stages")
    chunks: PositiveInt = Field(1, le=1_000, description="stages a pipeline rank holds under the interleaved schedule")
    stages: tuple[PositiveInt, ...] | None = Field(
        None, description="decoder layers of each stage, first to last; null = balanced by cost"
    )
    recompute: tuple[RecomputeName, ...] = Field(
        (), description="parts recomputed in backward instead of kept: a list of names, [] = none"
    )
