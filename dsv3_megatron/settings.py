"""The sections of a recipe that no room owns: ``run``, ``cluster`` with ``cluster.slurm``, ``logging``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt

from parallel.units import parse_bytes, parse_count


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f]", text):
        raise ValueError("it holds a control character; #SBATCH lines cannot")
    return text


def _as_text(value: object) -> object:
    """Return a whole number as the text it stands for: 1000 of memory, 30 minutes. What else YAML and Hydra read as no
    text may have been written otherwise (1.10, on)."""
    if isinstance(value, bool | float):
        raise ValueError(f"it was read as {'true or false' if isinstance(value, bool) else 'a number'}; quote the text")
    return str(value) if isinstance(value, int) else value


def _time(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        raise ValueError("it is not a time; write minutes, hours:minutes:seconds or days-hours, such as 24:00:00")
    if text.isdigit() and int(text) > 30 * 24 * 60:
        raise ValueError("that many minutes are over 30 days; quote a time with colons: YAML reads 24:00:00 as 86400")
    return text


def _interface(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,14}", text):
        raise ValueError("it is not a name of a network interface; write one as `ip link` shows it, such as ib0")
    return text


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is not a name of an environment variable")
    return values


Line = Annotated[str, BeforeValidator(_as_text), AfterValidator(_one_line)]
TimeLimit = Annotated[str, BeforeValidator(_as_text), AfterValidator(_time)]
Interface = Annotated[str, AfterValidator(_interface)]
Variables = Annotated[dict[str, Annotated[str, BeforeValidator(_as_text)]], AfterValidator(_variables)]
Count = Annotated[NonNegativeInt, BeforeValidator(parse_count)]
Bytes = Annotated[NonNegativeInt, BeforeValidator(parse_bytes)]


class SlurmSettings(BaseModel):
    """Options of the batch job that a cluster's file sets once for everybody."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: Line | None = Field(None, description="who pays; null = the user's default account")
    qos: Line | None = Field(None, description="quality of service; null = the partition's")
    constraint: Line | None = Field(None, description="features that nodes must have")
    reservation: Line | None = Field(None, description="reservation of nodes to use")
    exclude: Line | None = Field(None, description="nodes to keep away from, such as node[017,033]")
    exclusive: bool = Field(True, description="whole nodes; false only on shared test machines")
    memory: Line | None = Field("0", description="memory of a node; 0 = all of it, null = the partition's default")
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs of a node's agent; null = all the job has there")
    ranks_per_node: PositiveInt | None = Field(None, description="processes of a node; null = cluster.gpus_per_node")
    options: tuple[Line, ...] = Field((), description="further sbatch options as they stand, such as --switches=1")
    warning_seconds: PositiveInt = Field(
        300, description="USR1 so long before the time limit; at least a step, a save and 60 s (SLURM looks every 30 s)"
    )
    max_starts: PositiveInt = Field(
        3,
        description="give up after so many failed starts without a new checkpoint; what SLURM ends is none, up to ten "
        "times as many",
    )
    check_nodes: bool = Field(
        True, description="before every start look at GPUs, links, clocks and what each node sees; takes a minute"
    )
    exclude_after: NonNegativeInt = Field(
        2, description="keep away from a host that was the first to fail so often in a week; 0 = never"
    )
    exclude_slow_after: NonNegativeInt = Field(
        0, description="likewise from a host that was named the slowest so often (health.straggler_ratio); 0 = never"
    )
    spares: NonNegativeInt = Field(
        0,
        description="nodes to ask for beyond the layout's, if they are free: no start waits until a bad one is back",
    )
    restarts: NonNegativeInt = Field(0, description="restarts by torchrun within a job before the job itself fails")
    array_limit: PositiveInt | None = Field(None, description="points of a sweep that may run at once")
    python: Line | None = Field(
        None, description="interpreter of the job; null = the submitting one, python in a container"
    )
    interface: Interface | None = Field(
        None, description="interface of the fabric, such as ib0: ranks meet there and listen there alone; null = any"
    )
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = Field(
        None, description="bind ranks to the CPUs near their GPU, as torchrun does (needs numactl); null = do not"
    )
    setup: tuple[str, ...] = Field((), description="shell lines to run first on the batch host, such as module load")
    environment: Variables = Field(
        default_factory=dict,
        description="variables of every process: NCCL, UCX and network settings of this cluster; no secrets",
    )
    container: Literal["none", "pyxis", "apptainer"] = Field("none", description="what starts the container, if any")
    image: Line | None = Field(None, description="container image: a squash file, a .sif or a registry's name")
    mounts: tuple[Line, ...] = Field((), description="folders seen in the container: PATH or PATH:PATH")


class RunSettings(BaseModel):
    """The ``run`` section: what to call the run, where it lives, when it ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="what the run is called; its directory is runs/<name>")
    directory: str = Field(description="where the run's files go; runs/<name> unless told otherwise")
    readable_by: Literal["owner", "group"] = Field(
        "owner", description="who may read the run's files: owner, or group for a team"
    )
    seed: NonNegativeInt = Field(1234, description="of initialisation and of the order of the data")
    steps: PositiveInt | None = Field(None, description="stop after so many steps; null = when run.tokens are consumed")
    tokens: Count | None = Field(None, description="token budget of the run, such as 14.8T")
    resume: Literal["auto", "never", "required"] = Field(
        "auto", description="auto: go on from the newest valid checkpoint if there is one; required: refuse without one"
    )
    start_from: str | None = Field(
        None, description="run directory whose newest weights a new run begins with; tokens are counted anew"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where a GPU is, else cpu")
    start_seconds: float = Field(
        600.0, gt=0, description="end the process, so that it is started anew, when meeting or building takes so long"
    )
    checkpoint_seconds: float = Field(
        1800.0, gt=0, description="the same when loading a checkpoint takes so long, or a save that training waits for"
    )
    hang_seconds: float = Field(
        300.0, gt=0, description="tell where every rank is when one action of the pipeline takes longer than this"
    )
    abort_seconds: float | None = Field(
        1800.0, gt=0, description="end the process when one action takes so long; over run.hang_seconds; null = never"
    )
    evaluate_every_steps: NonNegativeInt = Field(0, description="held-out loss every so many steps; 0 = start and end")
    collect_garbage_every_steps: NonNegativeInt = Field(
        50, description="Python collects garbage so often, on all ranks at once; 0 = whenever it likes"
    )


class LinkSettings(BaseModel):
    """Bandwidth one GPU gets out of a class of links, one way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gigabytes_per_second: float = Field(gt=0, description="10^9 bytes a second a GPU can send, as achieved")
    latency_microseconds: float = Field(ge=0, description="time of the smallest message")
    own_node: bool = Field(
        False, description="between nodes: counts what stays on its node as sent, as DeepEP's benchmark prints it"
    )


class ClusterSettings(BaseModel):
    """The ``cluster`` section: hardware facts for the planner, job options for SLURM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="the file of recipes/cluster/ this came from")
    nodes: PositiveInt | None = Field(None, description="null = whatever torchrun starts")
    gpus_per_node: NonNegativeInt = Field(0, description="0 = a CPU machine")
    nvlink_domain: PositiveInt | None = Field(
        None, description="GPUs that NVLink joins where those are several nodes', such as 64 of a rack; null = a node's"
    )
    device: str = Field("cpu", description="what a rank computes on: cpu or cuda")
    memory: Bytes = Field(0, description="memory of one device, such as 80GiB; 0 = not known")
    peak_tflops: dict[Literal["fp32", "bf16", "fp8"], float] = Field(
        default_factory=dict, description="dense peak of one device by format, 10^12 floating-point operations a second"
    )
    architecture: Literal["hopper", "blackwell"] = Field(
        "hopper",
        description="which published kernels the planner prices with",
    )
    sms: NonNegativeInt = Field(0, description="streaming multiprocessors of one device; 0 = not known")
    communication_sms: NonNegativeInt = Field(0, description="SMs that expert dispatch and combine occupy")
    exchange_sms: NonNegativeInt = Field(
        0, description="SMs that dispatch and combine had where links were measured; 0 = the links alone bound them"
    )
    memory_terabytes_per_second: float = Field(0.0, ge=0, description="peak of the device's memory")
    reserved: Bytes = Field(0, description="allowance for the context of device and NCCL; no measurement")
    dollars_per_gpu_hour: float = Field(2.0, ge=0, description="rent of one device, for the plan's costs")
    failures_per_gpu_day: float = Field(
        4.7e-4, ge=0, description="failures of a run, by device and day; default: Llama 3's (arXiv 2407.21783, 3.3.4)"
    )
    storage_gigabytes_per_second: float | None = Field(
        None,
        gt=0,
        description="10^9 bytes a second that the file system takes from all hosts together; null = not known",
    )
    host_gigabytes_per_second: float = Field(
        50.0, gt=0, description="10^9 bytes a second that each device copies to its host's memory; default: PCIe 5"
    )
    start_seconds: float = Field(
        300.0,
        ge=0,
        description="from the end of failed ranks until others load a checkpoint: requeue, imports, building",
    )
    racks: tuple[str, ...] = Field(
        (), description="nodes of each rack, as patterns of their names with commas between, such as r01n*"
    )
    intra_node: LinkSettings | None = Field(None, description="links inside a node, or inside cluster.nvlink_domain")
    inter_node: LinkSettings | None = Field(None, description="links between those")
    launcher: Literal["torchrun", "slurm"] = Field("torchrun", description="what starts the ranks there")
    partition: Line | None = Field(None, description="SLURM partition; null = the cluster's default")
    time_limit: TimeLimit | None = Field(
        None, description="of one job: minutes, or such as 24:00:00; a run goes on over many"
    )
    slurm: SlurmSettings = SlurmSettings()

    @property
    def world_size(self) -> int | None:
        """GPUs of the whole cluster, or None where the cluster has no fixed size."""
        return self.nodes * self.gpus_per_node if self.nodes and self.gpus_per_node else None

    @property
    def fast_domain(self) -> int:
        """GPUs that the fast links join: a node's, or those of several nodes."""
        return self.nvlink_domain or max(self.gpus_per_node, 1)


class LoggingSettings(BaseModel):
    """The ``logging`` section: what of a run is written where, and how often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="offline: kept in the run directory until `wandb sync` uploads it"
    )
    wandb_project: str = Field("dsv3-megatron", description="W&B project that runs are shown in")
    wandb_group: str | None = Field(None, description="runs shown together; null = the recipe's name")
    tensorboard: bool = Field(False, description="event files in <run directory>/tensorboard too")
    report_every_seconds: NonNegativeInt = Field(
        60, description="report.html is written anew so often, and at the end; 0 = never"
    )
    expert_load_every_steps: PositiveInt = Field(50, description="load of every expert is kept every so many steps")
    console_every_steps: PositiveInt = Field(1, description="print a line every so many steps, where no terminal is")
