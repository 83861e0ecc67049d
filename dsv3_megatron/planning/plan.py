"""The plan of a run: parameters, memory of every pipeline rank, traffic, time of a step, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dsv3_megatron.model.costs import (
    Parameters,
    count_parameters,
    frozen_by_part,
    part_sizes,
    training_flops_per_token,
)
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.schedule import schedule_of
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.goodput.expected import Goodput, goodput, not_planned
from dsv3_megatron.planning.goodput.expected import why_not as why_no_goodput
from dsv3_megatron.planning.memory.ranks import Held, RankMemory, held_parameters, rank_memory, receives_ahead
from dsv3_megatron.planning.memory.stage_memory import StageMemory
from dsv3_megatron.planning.time.muon import MuonTime, muon_time
from dsv3_megatron.planning.time.pairing import paired
from dsv3_megatron.planning.time.steptime import StepModel, StepTime, step_time
from dsv3_megatron.precision.on_te import as_carried_out
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.links import Moved
from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulator import Times

if TYPE_CHECKING:
    from dsv3_megatron.planning.update.muon import RankUpdate

# Keys of plan.json's step that need the cluster's hardware facts.
_PRICED = (
    "seconds",
    "bubble_seconds",
    "pipeline_seconds",
    "gradient_tail_seconds",
    "optimizer_seconds",
    "tokens_per_second",
    "mfu",
    "mfu_not_causal",
    "tflops_per_device",
    "gpu_hours_per_trillion_tokens",
    "muon",
)
Measure = Callable[[Recipe, Layout, tuple[int, ...], Schedule], list[StageMemory]]


@dataclass(frozen=True)
class Plan:
    """What a recipe does on a cluster."""

    recipe: Recipe
    layout: Layout
    layers: tuple[int, ...]
    schedule: Schedule
    stages: list[StageMemory]
    held: list[Held]
    ranks: list[RankMemory]
    model: StepModel | None
    step: StepTime | None

    @property
    def fits(self) -> bool:
        """Whether every rank is within its device's memory."""
        return all(rank.fits for rank in self.ranks)

    @property
    def tightest(self) -> RankMemory:
        """The rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @cached_property
    def parameters(self) -> Parameters:
        """Exact counts."""
        return count_parameters(self.recipe.model)

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.schedule.microbatches * self.recipe.optim.micro_batch * self.layout.dp

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.recipe.data.sequence_length

    @property
    def priced_step(self) -> StepTime:
        """The step's time, where the cluster's facts price it; only then may it be asked for."""
        assert self.step is not None, f"cluster={self.recipe.cluster.name} prices no step"
        return self.step

    @property
    def priced_model(self) -> StepModel:
        """What the step's time was made of; as :attr:`priced_step`."""
        assert self.model is not None, f"cluster={self.recipe.cluster.name} prices no step"
        return self.model

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.priced_step.seconds

    def tflops_per_device(self, *, causal: bool) -> float:
        """Return 10^12 operations a second and GPU, in the convention of arXiv 2505.09343: neither MTP nor the gate,
        recomputation not counted."""
        model = self.recipe.model.model_copy(update={"num_nextn_predict_layers": 0})
        per_token = training_flops_per_token(model, self.recipe.data.sequence_length, causal=causal)
        gate = self.recipe.model.num_moe_layers * self.recipe.model.n_routed_experts * model.hidden_size
        frozen_gate = frozen_by_part(model, part_sizes(model))["router"]
        per_token -= 6 * gate - 2 * frozen_gate
        return per_token * self.tokens_per_second / self.layout.world_size / 1e12

    def mfu(self, *, causal: bool = True) -> float | None:
        """Return the share of the BF16 peak (float32 in a float32 run); None where the peak is not known."""
        peaks = self.recipe.cluster.peak_tflops
        peak = peaks.get("fp32" if self.recipe.precision.parameters == "fp32" else "bf16")
        return self.tflops_per_device(causal=causal) / peak if peak else None

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """What a trillion tokens costs."""
        return 1e12 / self.tokens_per_second * self.layout.world_size / 3600

    @property
    def budget_tokens(self) -> int:
        """Tokens of the whole run."""
        run = self.recipe.run
        return run.tokens if run.tokens is not None else (run.steps or 0) * self.tokens  # a recipe has one of the two

    def traffic(self) -> dict[str, Moved]:
        """Return what one GPU sends in a step, by what for, on the pipeline rank with the most MoE layers."""
        traffic, many = self.priced_model.traffic, self.schedule.microbatches
        place = self.schedule.placement
        mirrored = place.mirrored
        # A rank runs its stages for all microbatches that come by: under DualPipe half of them for each.
        share = 0.5 if mirrored else 1.0
        by_rank = [[self.priced_model.contents(s) for s in place.stages_of(rank)] for rank in range(place.ranks)]
        contents = max(by_rank, key=lambda stages: sum(c.get("moe", 0) for c in stages))
        moe = share * many * sum(c.get("moe", 0) for c in contents)
        dense = share * many * sum(c.get("dense", 0) for c in contents)
        fullest = max(self.held, key=lambda h: h.trained)
        messages = 0 if place.ranks == 1 else 2 * share * many * len(contents)
        return {
            "expert dispatch": traffic.dispatch() * (2 * moe),
            "expert combine": traffic.combine() * (2 * moe),
            "pipeline": traffic.send() * messages,
            "tensor parallel": traffic.tensor(moe=True) * (2 * moe) + traffic.tensor(moe=False) * (2 * dense),
            "context parallel": (traffic.context(backward=False) + traffic.context(backward=True)) * (moe + dense),
            "gradient reduce-scatter": traffic.gradients(fullest, mirrored=mirrored),
            "embedding all-reduce": traffic.embedding(place),
            "weight all-gather": traffic.weights(fullest, mirrored=mirrored),
            **self._muon_traffic(),
        }

    def _muon_traffic(self) -> dict[str, Moved]:
        """Return what the GPU that sends most for Muon sends."""
        muon = self.priced_step.muon
        return {} if muon is None else {"Muon, matrices to owners": muon.gathered, "Muon, updates back": muon.returned}

    @property
    def run_seconds(self) -> float:
        """Of all steps, at the speed of the last."""
        return self.budget_tokens / self.tokens_per_second

    @property
    def goodput_lacks(self) -> str | None:
        """Why nothing is said of failures and saves, or None."""
        if missing := missing_facts(self.recipe):
            return why_no_goodput(self.recipe) or f"cluster={self.recipe.cluster.name} gives no {missing}"
        return why_no_goodput(self.recipe)

    @cached_property
    def goodput(self) -> Goodput:
        """What failures and saves leave of the time; only where :attr:`goodput_lacks` is None."""
        return goodput(self.recipe, self.layout, step_seconds=self.priced_step.seconds, run_seconds=self.run_seconds)

    def as_json(self) -> dict[str, Any]:
        """Return plan.json. Where the cluster file lacks hardware facts, ``traffic`` is null, and so are ``step`` but
        for ``tokens``, and ``goodput`` but for ``not_planned``, the reason."""
        parameters, parallel = self.parameters, self.recipe.parallel
        return {
            "recipe": self.recipe.recipe,
            "cluster": self.recipe.cluster.name,
            "fits": self.fits,
            "world_size": self.layout.world_size,
            "parameters": {
                "main": parameters.main,
                "mtp": parameters.mtp,
                "activated_per_token": parameters.activated_per_token,
                "trained": parameters.trained,
                "frozen": parameters.frozen,
            },
            "layout": {
                **asdict(self.layout),
                "schedule": parallel.schedule,
                "chunks": parallel.chunks,
                "stages": list(self.layers),
                "recompute": list(parallel.recompute),
                "micro_batch": self.recipe.optim.micro_batch,
                "microbatches": self.schedule.microbatches,
            },
            "ranks": [{**asdict(rank), "total_bytes": rank.total_bytes} for rank in self.ranks],
            "traffic": self._traffic_json() if self.model else None,
            "step": self._step_json(),
            "goodput": not_planned(lacks) if (lacks := self.goodput_lacks) else self.goodput.as_json(),
        }

    def _traffic_json(self) -> dict[str, Any]:
        return {
            name: {"intra_node_bytes": m.intra_bytes, "inter_node_bytes": m.inter_bytes, "seconds": m.seconds}
            for name, m in self.traffic().items()
        }

    def _step_json(self) -> dict[str, Any]:
        step = self.step
        if step is None:  # every key all the same, so that what reads the file need not ask
            return {**dict.fromkeys(_PRICED), "tokens": self.tokens}
        return {
            "seconds": step.seconds,
            "bubble_seconds": step.bubble_seconds,
            "pipeline_seconds": step.pipeline_seconds,
            "gradient_tail_seconds": step.tail_seconds,
            "optimizer_seconds": step.optimizer_seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu(),
            "mfu_not_causal": self.mfu(causal=False),
            "tflops_per_device": self.tflops_per_device(causal=True),
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "muon": _muon_json(step.muon),
        }


def make_plan(
    recipe: Recipe,
    world: int,
    *,
    measure: Measure | None = None,
    times: Times | None = None,
    overlap: bool = False,
) -> Plan:
    """Return the plan of a recipe on ``world`` ranks.

    Args:
        measure: how stages' memory is found; None = by fake forwards of the real modules.
        times: of the stages, where they were measured.
        overlap: plan as if the schedule overlapped forwards with backwards, ours or not.
    Raises: LayoutError, ScheduleError: it cannot be.
    """
    recipe = _as_carried_out(recipe)
    layout, layers = recipe.layout(world), layers_of_stages(recipe)
    tokens = recipe.run.tokens or 0
    batch = Regime(recipe.optim, recipe.data.sequence_length).global_batch(tokens)
    schedule = schedule_of(recipe, batch // (recipe.optim.micro_batch * layout.dp))
    schedule = paired(schedule) if overlap else schedule
    if measure is None:
        from dsv3_megatron.planning.memory.activations import measure_stages  # torch: seconds to import

        measure = measure_stages
    stages = measure(recipe, layout, layers, schedule)
    place = schedule.placement
    held = [
        held_parameters(recipe, layout, place.stages_of(rank), stages, place.stages - 1) for rank in range(place.ranks)
    ]
    messages = receives_ahead(schedule)
    updates: Sequence[RankUpdate | None] = [None] * place.ranks
    if recipe.optim.name == "muon":
        from dsv3_megatron.planning.update.muon import updates_of_ranks  # torch: as above

        updates = updates_of_ranks(recipe, layout, layers)
    ranks = [
        rank_memory(recipe, layout, schedule, stages, held[r], r, messages[r], updates[r]) for r in range(place.ranks)
    ]
    model = step = None
    if missing_facts(recipe) is None:
        model = StepModel(recipe, layout, layers)
        muon = [muon_time(recipe, update, model.traffic.fabric) for update in updates if update is not None]
        step = step_time(model, schedule, held, times, muon)
    return Plan(recipe, layout, layers, schedule, stages, held, ranks, model, step)


def _muon_json(muon: MuonTime | None) -> dict[str, float] | None:
    if muon is None:
        return None
    return {
        "update_seconds": muon.seconds,
        "newton_schulz_seconds": muon.work_seconds,
        "exchange_seconds": muon.exchange_seconds,
        "waiting_seconds": muon.waiting_seconds,
        "memory_seconds": muon.memory_seconds,
    }


def _as_carried_out(recipe: Recipe) -> Recipe:
    """Return the recipe with what its backend does otherwise than its precision says."""
    if recipe.backend != "te" or recipe.precision.fp8 is None:
        return recipe
    precision = recipe.precision.model_copy(update={"fp8": as_carried_out(recipe.precision.fp8)})
    return recipe.model_copy(update={"precision": precision})


def missing_facts(recipe: Recipe) -> str | None:
    """Return which key of the cluster file a price of the step lacks, or None."""
    return next(
        (n for n in ("sms", "memory_terabytes_per_second", "peak_tflops") if not getattr(recipe.cluster, n)), None
    )
