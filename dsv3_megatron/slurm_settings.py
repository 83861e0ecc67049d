"""The ``cluster.slurm`` section: how a run becomes a batch job. Read by launcher/submit.py only."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f]", text):
        raise ValueError("it holds a control character; #SBATCH lines cannot")
    return text


def _as_text(value: object) -> object:
    """Return a number as the text it stands for: 1000 of memory, 30 minutes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _time(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        raise ValueError("it is not a time; write minutes, hours:minutes:seconds or days-hours, such as 24:00:00")
    if text.isdigit() and int(text) > 30 * 24 * 60:
        raise ValueError("that many minutes are over 30 days; quote a time with colons: YAML reads 24:00:00 as 86400")
    return text


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not a name of an environment variable")
    return values


Line = Annotated[str, BeforeValidator(_as_text), AfterValidator(_one_line)]
TimeLimit = Annotated[str, BeforeValidator(_as_text), AfterValidator(_time)]
Variables = Annotated[dict[str, Annotated[str, BeforeValidator(_as_text)]], AfterValidator(_variables)]


class SlurmSettings(BaseModel):
    """Options of the batch job that a cluster's file sets once for everybody."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: Line | None = Field(None, description="who pays; null = the user's default account")
    qos: Line | None = Field(None, description="quality of service; null = the partition's")
    constraint: Line | None = Field(None, description="features that nodes must have")
    reservation: Line | None = None
    exclude: Line | None = Field(None, description="nodes to keep away from, such as node[017,033]")
    exclusive: bool = Field(True, description="whole nodes; false only on shared test machines")
    memory: Line | None = Field("0", description="memory of a node; 0 = all of it, null = the partition's default")
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs of a node's agent; null = all the job has there")
    ranks_per_node: PositiveInt | None = Field(None, description="processes of a node; null = cluster.gpus_per_node")
    options: tuple[Line, ...] = Field((), description="further sbatch options as they stand, such as --switches=1")
    warning_seconds: PositiveInt = Field(
        300, description="USR1 so long before the time limit; at least a step, a save and 60 s (SLURM looks every 30 s)"
    )
    max_starts: PositiveInt = Field(3, description="give up after so many starts without a new checkpoint")
    restarts: NonNegativeInt = Field(0, description="restarts by torchrun within a job before the job itself fails")
    array_limit: PositiveInt | None = Field(None, description="points of a sweep that may run at once")
    python: Line | None = Field(
        None, description="interpreter of the job; null = the submitting one, python in a container"
    )
    setup: tuple[str, ...] = Field((), description="shell lines to run first on the batch host, such as module load")
    environment: Variables = Field(
        default_factory=dict, description="variables of every process: NCCL, UCX and network settings of this cluster"
    )
    container: Literal["none", "pyxis", "apptainer"] = "none"
    image: Line | None = Field(None, description="container image: a squash file, a .sif or a registry's name")
    mounts: tuple[Line, ...] = Field((), description="folders seen in the container: PATH or PATH:PATH")
