"""How long a step takes: kernels and exchanges of every stage, the real schedule simulated over them, and the tail.

A pass run alone does its kernels and its exchanges one after the other, on all SMs. Where a schedule overlaps a forward
with a backward (FB), kernels run on the SMs that communication leaves, and the pair takes as long as the longer of the
two: what DualPipe is for. A stage's gradients are reduced as soon as its last weight gradient is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.model.composition import composition
from dsv3_megatron.planning.memory.ranks import Held
from dsv3_megatron.planning.time.kernels import Kernels, PartTimes
from dsv3_megatron.planning.time.muon import ADAMW_BYTES, MuonTime
from dsv3_megatron.planning.time.roofline import Device
from dsv3_megatron.planning.time.traffic import Traffic
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulator import Timeline, Times, simulate


@dataclass(frozen=True)
class Work:
    """Seconds of one pass of one stage: kernels on all SMs, kernels beside communication; exchanges with experts alone,
    and on the SMs they have beside kernels.

    Collectives of TP and CP lie between the kernels that need them: they count as kernels.
    """

    kernels: float
    kernels_beside: float
    exchanges: float
    exchanges_beside: float

    @property
    def alone(self) -> float:
        """Run by itself, nothing hidden."""
        return self.kernels + self.exchanges


@dataclass(frozen=True)
class StageWork:
    """The passes of one stage."""

    forward: Work
    input_grad: Work
    weight_grad: Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. ``muon``: of ``optimizer_seconds``, on the rank that takes longest."""

    timeline: Timeline
    pipeline_seconds: float
    tail_seconds: float
    optimizer_seconds: float
    bubble_seconds: float
    muon: MuonTime | None = None

    @property
    def seconds(self) -> float:
        """The step."""
        return self.pipeline_seconds + self.tail_seconds + self.optimizer_seconds


class StepModel:
    """Prices the stages of a recipe on a layout."""

    def __init__(self, recipe: Recipe, layout: Layout, layers: Sequence[int]):
        self.recipe, self.layout, self.layers = recipe, layout, tuple(layers)
        self.traffic = Traffic(recipe, layout)
        busy = recipe.cluster.communication_sms if layout.ep > 1 else 0
        self._whole = Kernels(recipe, layout, Device(recipe.cluster))
        self._beside = Kernels(recipe, layout, Device(recipe.cluster, busy))
        self.parts = {name: (self._part(self._whole, name), self._part(self._beside, name)) for name in _PARTS}

    @staticmethod
    def _part(kernels: Kernels, name: str) -> PartTimes:
        if name in _LAYERS:
            moe, frozen = _LAYERS[name]
            return kernels.layer(moe=moe, frozen=frozen)
        return getattr(kernels, name)()

    def contents(self, stage: int) -> dict[str, int]:
        """Return how many of each part a stage has."""
        parts = composition(self.recipe.model, self.layers, stage)
        found = {
            "dense": parts.dense,
            "moe": parts.moe,
            "embedding": parts.embeddings,
            "head": parts.predictions,
            "mtp_joint": parts.mtp,
        }
        return {name: count for name, count in found.items() if count}

    def _priced(self, stage: int) -> dict[str, int]:
        """Return how many of each part a stage has, layers that are frozen as a whole apart."""
        parts, contents = composition(self.recipe.model, self.layers, stage), self.contents(stage)
        frozen = {"dense": parts.frozen_dense, "moe": parts.frozen_moe}
        return {
            **{name: count - frozen.get(name, 0) for name, count in contents.items()},
            **{f"{name}, frozen": count for name, count in frozen.items()},
        }

    def stage(self, stage: int) -> StageWork:
        """Return the passes of a stage."""
        contents, priced = self.contents(stage), self._priced(stage)
        exchanges, gathers = self._exchanges(contents), self._gathers(contents)

        def work(which: str) -> Work:
            whole, beside = (
                sum(count * self.parts[name][i].total(which) for name, count in priced.items()) for i in (0, 1)
            )
            gathered, exchanged = gathers[which], exchanges[which]
            slower = self.traffic.slower_beside_kernels
            return Work(whole + gathered, beside + gathered, exchanged, exchanged * slower)

        return StageWork(work("F"), work("I"), work("W"))

    def _exchanges(self, contents: dict[str, int]) -> dict[str, float]:
        """Return the seconds of a stage's dispatches and combines in each pass.

        The backward of a combine is a dispatch, that of a dispatch a combine. Recomputing a whole MoE layer exchanges
        its tokens once more.
        """
        one = self.traffic.dispatch().seconds + self.traffic.combine().seconds
        seconds = contents.get("moe", 0) * one
        again = seconds if {"full", "moe"} & set(self.recipe.parallel.recompute) else 0.0
        return {"F": seconds, "I": seconds + again, "W": 0.0}

    def _gathers(self, contents: dict[str, int]) -> dict[str, float]:
        """Return the seconds of TP's and CP's collectives in each pass; backward scatters what forward gathers."""
        moe, dense = contents.get("moe", 0), contents.get("dense", 0)
        tensor = moe * self.traffic.tensor(moe=True).seconds + dense * self.traffic.tensor(moe=False).seconds
        again = tensor if "full" in self.recipe.parallel.recompute else 0.0
        forward = tensor + (moe + dense) * self.traffic.context(backward=False).seconds
        backward = tensor + again + (moe + dense) * self.traffic.context(backward=True).seconds
        return {"F": forward, "I": backward, "W": 0.0}

    def times(self) -> Times:
        """Return what the simulator needs."""
        stages = [self.stage(s) for s in range(len(self.layers))]
        return Times(
            forward=tuple(s.forward.alone for s in stages),
            input_grad=tuple(s.input_grad.alone for s in stages),
            weight_grad=tuple(s.weight_grad.alone for s in stages),
            send=self.traffic.send().seconds,
            pairs=tuple(tuple(overlapped(f, b) for b in stages) for f in stages),
        )


# A layer's name -> whether it is MoE, and frozen as a whole.
_LAYERS = {"dense": (False, False), "moe": (True, False), "dense, frozen": (False, True), "moe, frozen": (True, True)}
_PARTS = (*_LAYERS, "embedding", "head", "mtp_joint")


def overlapped(forward: StageWork, backward: StageWork) -> float:
    """Return what a forward of one stage takes with a whole backward of another: kernels or exchanges, the longer."""
    parts = (forward.forward, backward.input_grad, backward.weight_grad)
    return max(sum(p.kernels_beside for p in parts), sum(p.exchanges_beside for p in parts))


def step_time(
    model: StepModel,
    schedule: Schedule,
    held: Sequence[Held],
    times: Times | None = None,
    muon: Sequence[MuonTime] = (),
) -> StepTime:
    """Return the time of a step.

    Args:
        held: parameters of every pipeline rank.
        times: of the stages; None = the model's own (others: measured ones, see ``calibrate``).
        muon: the update of every pipeline rank, where Muon is the optimizer.
    """
    times = times or model.times()
    timeline = simulate(schedule, times)
    mirrored = schedule.placement.mirrored
    done = _last_gradients(schedule, timeline)
    end = max(_reduced(model, schedule, done, rank, held[rank], mirrored) for rank in range(len(held)))
    tail = max(end, timeline.makespan) - timeline.makespan
    bubble = sum(timeline.bubble) / len(timeline.bubble)
    if muon:
        ends = [_update_seconds(model, schedule, h, mirrored, muon=m) for h, m in zip(held, muon)]
        update = max(ends)
        return StepTime(timeline, timeline.makespan, tail, update, bubble, muon[ends.index(update)])
    update = _update_seconds(model, schedule, max(held, key=lambda h: h.trained), mirrored)
    return StepTime(timeline, timeline.makespan, tail, update, bubble)


def _last_gradients(schedule: Schedule, timeline: Timeline) -> dict[int, float]:
    """Return when the last gradient of each stage is there, on whichever rank."""
    done: dict[int, float] = {}
    for steps, ends in zip(schedule.ranks, timeline.ends):
        for step, end in zip(steps, ends):
            for part in step.parts:
                if part.kind != "F":
                    done[part.stage] = max(done.get(part.stage, 0.0), end)
    return done


def _reduced(
    model: StepModel, schedule: Schedule, done: dict[int, float], rank: int, held: Held, mirrored: bool
) -> float:
    """Return when a rank's gradients are reduced: stage by stage, each after its last weight gradient anywhere."""
    stages = schedule.placement.stages_of(rank)
    share = model.traffic.gradients(held, mirrored=mirrored).seconds / len(stages)
    now = 0.0
    for end in sorted(done[stage] for stage in stages):
        now = max(now, end) + share
    return now


def _update_seconds(
    model: StepModel, schedule: Schedule, held: Held, mirrored: bool, *, muon: MuonTime | None = None
) -> float:
    """Return what follows the reduction of gradients on a rank: the update, AdamW's or ``muon``, and the all-gather of
    weights."""
    shard = held.shard(model.layout, copies=2 if mirrored else 1)
    # All gradients are divided by the step's tokens and set to zero again; weights are cast to FP8, by rows and by
    # columns.
    touched: float = (8 + 4) * held.trained + (2 + 2) * held.in_fp8
    if muon is None:
        touched += ADAMW_BYTES * shard
    moved = model.traffic.weights(held, mirrored=mirrored) + model.traffic.embedding(schedule.placement)
    moved = moved + model.traffic.largest_logits()
    return Device(model.recipe.cluster).memory(touched) + moved.seconds + (muon.seconds if muon else 0.0)
