"""A recipe: the sections owned by the packages below, put together, and the rules between sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt

from dsv3_megatron.checkpoint.settings import CheckpointSettings
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.health.settings import HealthSettings
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.settings import OptimSettings
from dsv3_megatron.precision.settings import PrecisionSettings
from dsv3_megatron.slurm_settings import SlurmSettings, TimeLimit
from parallel.errors import LayoutError, RecipeError
from parallel.layout import Layout, nearest_divisors
from parallel.pipeline.actions import Placement
from parallel.schedules import placement
from parallel.settings import ParallelSettings
from parallel.units import parse_bytes, parse_count

Count = Annotated[NonNegativeInt, BeforeValidator(parse_count)]
Bytes = Annotated[NonNegativeInt, BeforeValidator(parse_bytes)]


class RunSettings(BaseModel):
    """The ``run`` section: what to call the run, where it lives, when it ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    directory: str = Field(description="where the run's files go; runs/<name> unless told otherwise")
    seed: NonNegativeInt = 1234
    steps: PositiveInt | None = Field(None, description="stop after so many steps; null = when run.tokens are consumed")
    tokens: Count | None = Field(None, description="token budget of the run, such as 14.8T")
    resume: Literal["auto", "never", "required"] = "auto"
    start_from: str | None = Field(
        None, description="run directory whose newest weights a new run begins with; tokens are counted anew"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where a GPU is, else cpu")
    hang_seconds: float = Field(
        300.0, gt=0, description="tell where every rank is when one action of the pipeline takes longer than this"
    )
    abort_seconds: float | None = Field(
        1800.0, gt=0, description="end the process, so that it is started anew, when nothing moves for so long"
    )
    evaluate_every_steps: NonNegativeInt = Field(0, description="held-out loss every so many steps; 0 = start and end")


class LinkSettings(BaseModel):
    """Bandwidth one GPU gets out of a class of links, one way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gigabytes_per_second: float = Field(gt=0, description="10^9 bytes a second a GPU can send, as achieved")
    latency_microseconds: float = Field(ge=0)
    own_node: bool = Field(
        False, description="between nodes: counts what stays on its node as sent, as DeepEP's benchmark prints it"
    )


class ClusterSettings(BaseModel):
    """The ``cluster`` section: hardware facts for the planner, job options for SLURM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    nodes: PositiveInt | None = Field(None, description="null = whatever torchrun starts")
    gpus_per_node: NonNegativeInt = Field(0, description="0 = a CPU machine")
    device: str = "cpu"
    memory: Bytes = Field(0, description="memory of one device, such as 80GiB; 0 = not known")
    peak_tflops: dict[Literal["fp32", "bf16", "fp8"], float] = Field(
        default_factory=dict, description="dense peak of one device by format, 10^12 floating-point operations a second"
    )
    architecture: Literal["hopper", "blackwell"] = Field(
        "hopper",
        description="which published kernels the planner prices with (dsv3_megatron/planning/time/efficiency.py)",
    )
    sms: NonNegativeInt = 0
    communication_sms: NonNegativeInt = Field(0, description="SMs that expert dispatch and combine occupy")
    exchange_sms: NonNegativeInt = Field(
        0, description="SMs that dispatch and combine had where links were measured; 0 = the links alone bound them"
    )
    memory_terabytes_per_second: float = Field(0.0, ge=0, description="peak of the device's memory")
    reserved: Bytes = Field(0, description="allowance for the context of device and NCCL; no measurement")
    dollars_per_gpu_hour: float = Field(2.0, ge=0)
    intra_node: LinkSettings | None = None
    inter_node: LinkSettings | None = None
    launcher: Literal["torchrun", "slurm"] = "torchrun"
    partition: str | None = Field(None, description="SLURM partition; null = the cluster's default")
    time_limit: TimeLimit | None = Field(
        None, description="of one job: minutes, or such as 24:00:00; a run goes on over many"
    )
    slurm: SlurmSettings = SlurmSettings()

    @property
    def world_size(self) -> int | None:
        """GPUs of the whole cluster, or None where the cluster has no fixed size."""
        return self.nodes * self.gpus_per_node if self.nodes and self.gpus_per_node else None


class LoggingSettings(BaseModel):
    """The ``logging`` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "dsv3-megatron"
    wandb_group: str | None = Field(None, description="runs shown together; null = the recipe's name")
    tensorboard: bool = Field(False, description="event files in <run directory>/tensorboard too")
    report_every_seconds: NonNegativeInt = Field(
        60, description="report.html is written anew so often, and at the end; 0 = never"
    )
    expert_load_every_steps: PositiveInt = Field(50, description="load of every expert is kept every so many steps")
    console_every_steps: PositiveInt = 1


class Recipe(BaseModel):
    """One run, wholly described. Built by :func:`launcher.compose.compose`, which also calls :meth:`check`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field(description="the file of recipes/recipe/ this came from")
    run: RunSettings
    model: ModelSettings
    parallel: ParallelSettings
    precision: PrecisionSettings
    backend: Literal["auto", "te", "torch"] = "auto"
    optim: OptimSettings
    data: DataSettings
    checkpoint: CheckpointSettings
    health: HealthSettings = HealthSettings()
    cluster: ClusterSettings
    logging: LoggingSettings

    def check(self) -> None:
        """Raise RecipeError or LayoutError where sections contradict each other. Needs no world size."""
        self.model.check()
        if self.run.steps is None and self.run.tokens is None:
            raise RecipeError("run.steps and run.tokens are both null; set one of them, or the run has no end")
        if self.precision.fp8 is not None:
            self.precision.fp8.check()
        self._check_model_against_layout()
        self._check_curves()

    def _check_model_against_layout(self) -> None:
        model, parallel = self.model, self.parallel
        for field in ("expert", "expert_tensor"):
            of_what = {"expert": "n_routed_experts", "expert_tensor": "moe_intermediate_size"}[field]
            self._must_divide(
                f"parallel.{field}", getattr(parallel, field), f"model.{of_what}", getattr(model, of_what)
            )
        for of_what in ("num_attention_heads", "vocab_size", "intermediate_size"):
            self._must_divide("parallel.tensor", parallel.tensor, f"model.{of_what}", getattr(model, of_what))
        # Under context parallelism a rank attends with its share of the heads (model/context.py).
        heads = model.num_attention_heads // parallel.tensor
        what = "model.num_attention_heads" if parallel.tensor == 1 else "model.num_attention_heads / parallel.tensor"
        self._must_divide("parallel.context", parallel.context, what, heads)
        # Zigzag context parallelism gives every rank two pieces of the sequence; sequence parallelism shards each
        # of them again over TP.
        if self.data.sequence_length % (cut := (2 * parallel.context if parallel.context > 1 else 1) * parallel.tensor):
            raise LayoutError(
                f"data.sequence_length = {self.data.sequence_length} is not a multiple of {cut}, which "
                f"parallel.context = {parallel.context} and parallel.tensor = {parallel.tensor} need; "
                f"nearest that is: {max(1, round(self.data.sequence_length / cut)) * cut}"
            )
        for field in ("tensor", "context") if model.topk_method == "capacity" else ():
            if getattr(parallel, field) > 1:
                raise LayoutError(
                    f"parallel.{field} = {getattr(parallel, field)} cuts sequences, but model.topk_method = capacity "
                    f"serves the tokens of whole ones in order; set parallel.{field}=1"
                )
        stages = self.placement().stages
        if parallel.stages is not None:
            if len(parallel.stages) != stages:
                raise LayoutError(
                    f"parallel.stages = {list(parallel.stages)} names {len(parallel.stages)} stages, but "
                    f"parallel.pipeline = {parallel.pipeline} under {parallel.schedule} has {stages}; "
                    f"give {stages} numbers, or null to balance them"
                )
            if sum(parallel.stages) != model.num_hidden_layers:
                raise LayoutError(
                    f"parallel.stages = {list(parallel.stages)} adds up to {sum(parallel.stages)} layers, but "
                    f"model.num_hidden_layers = {model.num_hidden_layers}; make them equal, or null to balance"
                )
        if model.num_hidden_layers < stages:
            raise LayoutError(
                f"model.num_hidden_layers = {model.num_hidden_layers} is fewer than the {stages} stages of "
                f"parallel.pipeline = {parallel.pipeline}; lower parallel.pipeline to {model.num_hidden_layers} or less"
            )
        if parallel.schedule != "interleaved" and parallel.chunks > 1:
            raise LayoutError(
                f"parallel.chunks = {parallel.chunks} belongs to parallel.schedule=interleaved, "
                f"but the schedule is {parallel.schedule}; set parallel.chunks=1"
            )

    def placement(self, microbatches: int = 1) -> Placement:
        """Return where the stages lie."""
        parallel = self.parallel
        return placement(parallel.schedule, parallel.pipeline, microbatches, parallel.chunks)

    @staticmethod
    def _must_divide(name: str, value: int, of_name: str, of_value: int) -> None:
        if of_value % value:
            raise LayoutError(
                f"{name} = {value} does not divide {of_name} = {of_value}; "
                f"nearest that do: {nearest_divisors(of_value, value)}"
            )

    def _check_curves(self) -> None:
        """Phases must follow each other in tokens, and moving ones must say where they go."""
        from dsv3_megatron.optim.regime import Regime

        Regime(self.optim, self.data.sequence_length)

    def layout(self, world_size: int) -> Layout:
        """Return who holds what on ``world_size`` ranks. Raises LayoutError when the degrees do not fit."""
        layout = Layout.of(self.parallel, world_size)
        sequences = self.optim.micro_batch * layout.dp
        if isinstance(batch := self.optim.global_batch, int):
            self._must_batch("optim.global_batch", batch, sequences, layout.dp)
        else:
            self._must_batch("optim.batch_multiple", self.optim.batch_multiple, sequences, layout.dp)
        return layout

    def _must_batch(self, field: str, value: int, sequences: int, dp: int) -> None:
        if value % sequences:
            below, above = value // sequences * sequences, (value // sequences + 1) * sequences
            near = " or ".join(str(n) for n in (below, above) if n)
            raise LayoutError(
                f"{field} = {value} is not a multiple of optim.micro_batch = {self.optim.micro_batch} times "
                f"{dp} data-parallel ranks = {sequences}; use {near}, or change optim.micro_batch"
            )
