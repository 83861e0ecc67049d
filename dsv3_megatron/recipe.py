"""A recipe: the sections owned by the packages below, put together, and the rules between sections."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsv3_megatron.checkpoint.settings import CheckpointSettings
from dsv3_megatron.data.mixture.phases import mixture_of_recipe
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.tasks.settings import EvaluateSettings
from dsv3_megatron.health.settings import HealthSettings
from dsv3_megatron.model.freeze import MTP, check_freeze, frozen_layers
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.optim.settings import MuonSettings, OptimSettings
from dsv3_megatron.precision.settings import PrecisionSettings
from dsv3_megatron.run.recipe_text.leaves import leaves
from dsv3_megatron.run.recipe_text.secret_values import check_secrets
from dsv3_megatron.settings import ClusterSettings, LoggingSettings, RunSettings
from parallel.errors import LayoutError, RecipeError
from parallel.layout import Layout, nearest_divisors
from parallel.pipeline.actions import Placement
from parallel.schedules import placement
from parallel.settings import ParallelSettings
from parallel.units import MOST


class Recipe(BaseModel):
    """One run, wholly described. Built by launcher.command_line.compose.compose, which also calls :meth:`check`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field(pattern=r"^\w[\w.-]*$", description="the file of recipes/recipe/ this came from")
    run: RunSettings
    model: ModelSettings
    parallel: ParallelSettings
    precision: PrecisionSettings
    backend: Literal["auto", "te", "torch"] = Field(
        "auto", description="te: Transformer Engine; torch: PyTorch alone; auto: te where it and a GPU are, else torch"
    )
    optim: OptimSettings
    data: DataSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings
    health: HealthSettings = HealthSettings()
    cluster: ClusterSettings
    logging: LoggingSettings

    def check(self) -> None:
        """Raise RecipeError or LayoutError where sections contradict each other. Needs no world size."""
        values = self.model_dump(mode="json")
        for key, value in leaves(values):  # larger ones, and none at all, make sums that are not exact, nor soon done
            if isinstance(value, int | float) and not -MOST <= value <= MOST:
                raise RecipeError(f"{key} = {str(value)[:40]} is not a number up to {MOST:,}; write one that is")
        try:
            check_secrets(values)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        self.model.check()
        cluster = self.cluster
        if cluster.gpus_per_node and cluster.fast_domain % cluster.gpus_per_node:
            raise RecipeError(
                f"cluster.nvlink_domain = {cluster.nvlink_domain} is not a multiple of cluster.gpus_per_node = "
                f"{cluster.gpus_per_node}; count the GPUs of whole nodes that NVLink joins, or null for one node's"
            )
        if self.run.steps is None and self.run.tokens is None:
            raise RecipeError("run.steps and run.tokens are both null; set one of them, or the run has no end")
        if self.run.abort_seconds is not None and self.run.abort_seconds <= self.run.hang_seconds:
            raise RecipeError(
                f"run.hang_seconds = {self.run.hang_seconds:g} is not below run.abort_seconds = "
                f"{self.run.abort_seconds:g}, after which nobody is left to tell; lower it"
            )
        self.evaluate.check()
        if self.evaluate.tasks and self.data.source in ("synthetic", "recall"):
            raise RecipeError(
                f"evaluate.tasks = {list(self.evaluate.tasks)} are text, but data.source = {self.data.source} has no "
                "tokenizer; use data=stdlib or data=indexed, or leave the tasks out"
            )
        if self.precision.fp8 is not None:
            self.precision.fp8.check()
        self._check_interval()
        self._check_freeze()
        self._check_optimizer()
        self._check_qk_clip()
        self._check_model_against_layout()
        self._check_curves()

    def _check_interval(self) -> None:
        if self.checkpoint.every_minutes != "auto":
            return
        cluster = self.cluster
        lacking = {
            f"cluster={cluster.name} has no GPUs, whose failures it is planned from": cluster.device == "cpu",
            "cluster.failures_per_gpu_day = 0, where nothing fails": not cluster.failures_per_gpu_day,
            f"cluster={cluster.name} gives no storage_gigabytes_per_second": not cluster.storage_gigabytes_per_second,
        }
        if why := next((why for why, lacks in lacking.items() if lacks), None):
            raise RecipeError(f"checkpoint.every_minutes = auto cannot be planned: {why}; write minutes instead")

    def _check_freeze(self) -> None:
        check_freeze(self.model)
        if self.model.freeze and self.precision.fp8 is not None and self.precision.fp8.hold_weights:
            raise RecipeError(
                f"model.freeze = {list(self.model.freeze)} cannot go with precision.fp8.hold_weights = true, which "
                "leaves no more of a frozen weight than FP8 holds; set hold_weights=false"
            )

    def _check_optimizer(self) -> None:
        if self.optim.name == "muon":
            return
        given, default = self.optim.muon, MuonSettings()
        for field in MuonSettings.model_fields:
            if (value := getattr(given, field)) != getattr(default, field):
                shown = list(value) if isinstance(value, tuple) else value
                raise RecipeError(
                    f"optim.muon.{field} = {shown} has no effect under optim.name = {self.optim.name}; "
                    "set optim.name=muon, or leave it out"
                )

    def _check_qk_clip(self) -> None:
        """What is frozen cannot be clipped, and its logits may grow all the same."""
        whole, mtp = frozen_layers(self.model.freeze), MTP in self.model.freeze and self.model.num_nextn_predict_layers
        if self.optim.qk_clip is not None and ("attention" in self.model.freeze or whole or mtp):
            raise RecipeError(
                f"optim.qk_clip = {self.optim.qk_clip:g} scales attention's projections, which model.freeze = "
                f"{list(self.model.freeze)} freezes in some layers; set optim.qk_clip=null, or train attention in all"
            )

    def _check_model_against_layout(self) -> None:
        model, parallel = self.model, self.parallel
        for field in ("expert", "expert_tensor"):
            of_what = {"expert": "n_routed_experts", "expert_tensor": "moe_intermediate_size"}[field]
            self._must_divide(
                f"parallel.{field}", getattr(parallel, field), f"model.{of_what}", getattr(model, of_what)
            )
        for of_what in ("num_attention_heads", "vocab_size", "intermediate_size"):
            self._must_divide("parallel.tensor", parallel.tensor, f"model.{of_what}", getattr(model, of_what))
        # Under context parallelism a rank attends with its share of the heads (model/layers/context.py).
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
        Regime(self.optim, self.data.sequence_length)
        mixture_of_recipe(self.data)

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
