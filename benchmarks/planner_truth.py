"""The planner beside what others have published: python benchmarks/planner_truth.py. No GPU; about a minute.

Every row says what was published, what is predicted, the residual, and whether the published number was used to build
the time model. Writes results/planner_truth.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

from dsv3_megatron.planning.formulae import estimate_stages
from dsv3_megatron.planning.kernels import Kernels
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.planning.roofline import Device
from dsv3_megatron.planning.steptime import StepModel, overlapped
from launcher.compose import compose
from parallel.schedules import make_schedule
from parallel.simulator import Times, simulate

GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Row:
    """One published number and ours."""

    what: str
    published: float
    predicted: float
    unit: str
    used: bool = False

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
        Row("dispatch, forward (beside kernels)", 4.3, 1e3 * model.traffic.dispatch().seconds, "ms"),
        Row("dispatch of gradients (beside kernels)", 3.4, 1e3 * model.traffic.dispatch().seconds, "ms"),
        Row("combine (beside kernels)", 6.2, 1e3 * model.traffic.combine().seconds, "ms"),
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
        Row("1F1B", 13.95, sums["FB"], "s"),
        Row("bubble", 2.06, plan.step.bubble_seconds, "s"),
        Row("optimizer", 0.29, plan.step.optimizer_seconds + plan.step.tail_seconds, "s"),
        Row("step", 19.926, plan.step.seconds, "s"),
        Row("TFLOP/s a GPU, causal", 385, plan.tflops_per_device(causal=True), ""),
        Row("TFLOP/s a GPU, not causal", 432, plan.tflops_per_device(causal=False), ""),
        Row("GPU-hours per trillion tokens", 180e3, plan.gpu_hours_per_trillion_tokens, "h"),
    ]


OTHERS = (
    # name, tokens/s a GPU, overrides
    (
        "PaddleFleet, 256 H800, FP8",
        1400,
        ["cluster=h800_256", "parallel.pipeline=8", "parallel.expert=32", "parallel.schedule=dualpipev"],
    ),
    (
        "Megatron-Bridge 25.09, 1,024 H100, FP8",
        1297,
        [
            "cluster=h100_1024",
            "parallel.tensor=2",
            "parallel.pipeline=8",
            "parallel.schedule=interleaved",
            "parallel.chunks=4",
            "optim.global_batch=8192",
            "precision.fp8.dispatch=high",
            "parallel.stages=[2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,1,1,1]",
        ],
    ),
    (
        "Megatron-Bridge 26.04.01, 256 B200, MXFP8",
        3328,
        [
            "cluster=b200_256",
            "parallel.pipeline=8",
            "parallel.expert=32",
            "parallel.schedule=interleaved",
            "parallel.chunks=2",
            "optim.global_batch=4096",
            "precision.fp8.dispatch=high",
        ],
    ),
    (
        "torchtitan, 256 B200, BF16 (layout not stated: PP 8, EP 32, 1F1B)",
        859,
        [
            "cluster=b200_256",
            "precision=bf16",
            "parallel.pipeline=8",
            "parallel.expert=32",
            "parallel.schedule=1f1b",
            "optim.global_batch=4096",
        ],
    ),
)


def other_rows() -> list[Row]:
    """Tokens a second and GPU that other frameworks publish."""
    rows = []
    for name, published, overrides in OTHERS:
        recipe = compose(["recipe=dsv3_671b", *overrides])
        if "precision=bf16" in overrides:
            recipe = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"fp8": None})})
        plan = make_plan(recipe, recipe.cluster.world_size, measure=estimate_stages)
        rows.append(Row(name, published, plan.tokens_per_second / plan.layout.world_size, "tokens/s a GPU"))
    return rows


def memory_rows() -> list[Row]:
    """Megatron-core's report, arXiv 2603.07685: TP 1 PP 4 VPP 4 EP 64 on 256 GPUs, GB a GPU, moments as there."""
    recipe = compose(
        [
            "recipe=dsv3_671b",
            "cluster=b200_256",
            "parallel.pipeline=4",
            "parallel.schedule=interleaved",
            "parallel.chunks=4",
            "parallel.recompute=[]",
            "precision=bf16",
            "precision.moments=fp32",
            "optim.global_batch=4096",
        ]
    )
    recipe = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"fp8": None})})
    plan = make_plan(recipe, 256, measure=estimate_stages)
    fullest = plan.tightest
    return [
        Row("weights and gradients", 36.4, (fullest.weights_bytes + fullest.gradients_bytes) / GB, "GB"),
        Row("master and Adam", 32.1, fullest.optimizer_bytes / GB, "GB"),
        Row("activations, nothing recomputed, BF16", 131.0, fullest.activations_bytes / GB, "GB"),
    ]


def main() -> None:
    """Print and write the comparison."""
    recipe = compose(["recipe=dsv3_671b"])
    plan = make_plan(recipe, 2048, measure=estimate_stages)
    sections = {
        "DeepSeek-V3 on 2,048 H800 (arXiv 2505.09343 table 4), roofline alone": step_rows(plan),
        "The same table, its own chunk times given to the simulator": with_published_chunk_times(),
        "Published profile of one overlapped pair (deepseek-ai/profile-data)": profile_rows(),
        "Tokens a second and GPU of other frameworks": other_rows(),
        "Memory, arXiv 2603.07685 (fullest rank)": memory_rows(),
    }
    for title, rows in sections.items():
        print(f"\n{title}\n")
        print("| | published | predicted | residual | |\n|---|---|---|---|---|")
        for row in rows:
            note = "used to build the model" if row.used else ""
            print(f"| {row.what} | {row.published:g} {row.unit} | {row.predicted:.4g} | {row.residual:+.1%} | {note} |")
    results = {t: [asdict(r) | {"residual": r.residual} for r in rows] for t, rows in sections.items()}
    path = Path(__file__).parent / "results" / "planner_truth.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
