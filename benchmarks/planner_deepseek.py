"""The rows of benchmarks/planner_truth.py that DeepSeek published: its step (arXiv 2505.09343) and its profile.

Fair where like is with like: a row says if its published number helped to build the time model, or what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.planning.plan import Plan
from dsv3_megatron.planning.time.kernels import Kernels
from dsv3_megatron.planning.time.roofline import Device
from dsv3_megatron.planning.time.steptime import StepModel, overlapped
from launcher.command_line.compose import compose
from parallel.pipeline.simulator import Times, simulate
from parallel.schedules import make_schedule


@dataclass(frozen=True)
class Row:
    """One published number and ours; ``used``: it helped to build the model; ``note``: where like is not with like."""

    what: str
    published: float
    predicted: float
    unit: str
    used: bool = False
    note: str = ""

    @property
    def residual(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1


def profile_rows() -> list[Row]:
    """deepseek-ai/profile-data: four MoE layers forward and backward overlapped, EP 64, 4,096 tokens."""
    recipe = compose(["recipe=dsv3_671b", "parallel.recompute=[norm,mla_up,moe_act]"])
    layout = recipe.layout(2048)
    layer = Kernels(recipe, layout, Device(recipe.cluster, recipe.cluster.communication_sms)).layer(moe=True).passes
    model = StepModel(recipe, layout, (3, *(4,) * 14, 2))

    def of(kind: str, *passes: str) -> float:
        return 1e3 * sum(seconds for p in passes for name, seconds in layer[p].items() if kind in name)

    beside = 1e3 * model.traffic.slower_beside_kernels
    dispatch, combine = (beside * moved.seconds for moved in (model.traffic.dispatch(), model.traffic.combine()))
    dense = of("attention products", "F", "I") + of("feed-forward products", "F", "I")
    rows = [
        Row("dense FP8 products, forward, dgrad, recompute", 4.7, dense, "ms a layer"),
        Row("grouped FP8 products, forward and dgrad", 5.7, of("experts products", "F", "I"), "ms a layer"),
        Row("FP8 weight gradients", 8.2, of("products", "W"), "ms a layer", used=True),
        Row("attention forward", 1.2, of("attention core", "F"), "ms a layer"),
        Row("attention backward", 4.3, of("attention core", "I"), "ms a layer"),
        Row("casts and transposes", 4.2, of("casts", "F", "I"), "ms a layer", used=True),
        Row("norms", 0.9, of("norm", "F", "I"), "ms a layer"),
        Row("SwiGLU", 0.5, of("swiglu", "F", "I"), "ms a layer"),
        Row(
            "dispatch, forward (beside kernels)",
            4.3,
            dispatch,
            "ms",
            note="waits for others included",
        ),
        Row("dispatch of gradients (beside kernels)", 3.4, dispatch, "ms"),
        Row("combine (beside kernels)", 6.2, combine, "ms"),
    ]
    stage = model.stage(5)
    return [*rows, Row("the pair, four layers", 129.0, 1e3 * overlapped(stage, stage), "ms", used=True)]


def with_published_chunk_times() -> list[Row]:
    """arXiv 2505.09343 table 4 from its own chunk times: what of the bubble the schedule and unequal stages explain."""
    schedule = make_schedule("dualpipe", 16, 120)
    counts = {kind: 0.0 for kind in ("F", "B", "I", "W", "FB")}
    for steps in schedule.ranks:
        for step in steps:
            counts[step.kind] += 1 / 16
    # The table's sums divided by how often the schedule has each: a backward run alone is booked whole under 1B.
    forward, pair = 1.13 / counts["F"], 13.95 / counts["FB"]
    weight = 0.48 / counts["W"]
    input_grad = (1.99 - counts["B"] * weight) / (counts["B"] + counts["I"])
    rows = []
    layers = compose(["recipe=dsv3_671b"])
    model = StepModel(layers, layers.layout(2048), (4,) * 15 + (1,))
    stages = [model.stage(s) for s in range(16)]
    mean_pair = sum(overlapped(a, b) for a, b in zip(stages, reversed(stages))) / 16
    for name, unequal in (("equal stages", False), ("our split's stages", True)):
        pairs = tuple(tuple(pair * (overlapped(a, b) / mean_pair if unequal else 1.0) for b in stages) for a in stages)
        scale = [s.forward.alone / (sum(x.forward.alone for x in stages) / 16) if unequal else 1.0 for s in stages]
        times = Times(
            tuple(forward * x for x in scale),
            tuple(input_grad * x for x in scale),
            tuple(weight * x for x in scale),
            send=model.traffic.send().seconds,
            pairs=pairs,
        )
        timeline = simulate(schedule, times)
        bubble = sum(timeline.bubble) / 16
        rows.append(Row(f"bubble, {name}, published chunk times", 2.06, bubble, "s"))
        rows.append(Row(f"step, {name}, published chunk times", 19.926, timeline.makespan + 0.29, "s"))
    return rows


def step_rows(plan: Plan) -> list[Row]:
    """arXiv 2505.09343 table 4 from the roofline alone."""
    schedule, times = plan.schedule, plan.model.times()
    sums = {kind: 0.0 for kind in ("F", "B", "W", "FB")}
    for steps in schedule.ranks:
        for step in steps:
            kind = "B" if step.kind == "I" else step.kind
            sums[kind] += times.duration(step) / len(schedule.ranks)
    return [
        Row("1F", 1.13, sums["F"], "s"),
        Row("1B", 1.99, sums["B"], "s"),
        Row("1W", 0.48, sums["W"], "s"),
        Row("1B and 1W together", 1.99 + 0.48, sums["B"] + sums["W"], "s"),
        Row("1F1B", 13.95, sums["FB"], "s"),
        Row("bubble", 2.06, plan.step.bubble_seconds, "s"),
        Row("optimizer", 0.29, plan.step.optimizer_seconds + plan.step.tail_seconds, "s"),
        Row("step", 19.926, plan.step.seconds, "s"),
        Row("TFLOP/s a GPU, causal", 385, plan.tflops_per_device(causal=True), ""),
        Row("TFLOP/s a GPU, not causal", 432, plan.tflops_per_device(causal=False), ""),
        Row("GPU-hours per trillion tokens", 180e3, plan.gpu_hours_per_trillion_tokens, "h"),
    ]
