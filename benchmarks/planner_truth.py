"""The planner beside what others have published: python -m benchmarks.planner_truth. No GPU; a minute.

Every row says what was published, what is predicted, the residual, and whether the published number was used to build
the time model. Writes results/planner_truth.json.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

warnings.filterwarnings("ignore")

from benchmarks.planner_deepseek import Row, profile_rows, step_rows, with_published_chunk_times
from benchmarks.published_runs import GB200, RUNS
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.memory.te_gradients import placeholder_bytes
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose
from parallel.units import GIB


def run_rows(*, held_out: bool) -> list[Row]:
    """Tokens a second and GPU of published runs."""
    rows = []
    for run in RUNS:
        if run.held_out != held_out:
            continue
        recipe = compose(["recipe=dsv3_671b", *run.overrides])
        recipe = recipe if run.fp8 else _without_fp8(recipe)
        plan = make_plan(recipe, recipe.cluster.world_size, measure=estimate_stages, overlap=run.overlapped)
        each = plan.tokens_per_second / plan.layout.world_size
        rows.append(Row(run.name, run.tokens, each, "tokens/s a GPU", note=run.differs))
    return rows


def _without_fp8(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"fp8": None})})


def memory_rows() -> list[Row]:
    """megatron-core's report, arXiv 2603.07685: TP 1 PP 4 VPP 4 EP 64 on 256 GPUs, moments in float32.

    Its "GB" are GiB and its GPU is one of pipeline rank 2, sixteen MoE layers and neither embedding nor loss: of all
    ranks and units that one gives its first two rows. The others are then a test. What recomputation saves is that of
    FP8 linear layers, which keep copies of their inputs in one byte.
    """

    def plan(*recompute: str, fp8: bool = True) -> Plan:
        words = ["precision.fp8.hold_weights=false", "precision.moments=fp32"]
        recipe = compose(["recipe=dsv3_671b", *GB200, *words, f"parallel.recompute=[{','.join(recompute)}]"])
        return make_plan(recipe if fp8 else _without_fp8(recipe), 256)

    plain, in_bf16 = plan(), plan(fp8=False)
    bf16 = in_bf16.ranks[2]
    # Before its permutation took in the router's weights, megatron-core kept what every expert gave a token.
    model, live = in_bf16.recipe.model, bf16.live_microbatches
    outputs = 4 * live * 4096 * model.num_experts_per_tok * model.hidden_size * 2
    placeholders = placeholder_bytes(in_bf16.recipe, in_bf16.layout, in_bf16.recipe.placement().stages_of(2))

    def saved(name: str) -> float:
        return (plain.ranks[2].activations_bytes - plan(name).ranks[2].activations_bytes) / GIB

    return [
        Row(
            "weights and gradients",
            36.4,
            (bf16.weights_bytes + bf16.gradients_bytes) / GIB,
            "GiB",
            used=True,
            note=f"{placeholders / GIB:.1f} of it is what TE keeps in place of weight gradients",
        ),
        Row("master and Adam", 32.1, bf16.optimizer_bytes / GIB, "GiB", used=True),
        Row(
            "activations, nothing recomputed, BF16, experts' outputs kept",
            131.0,
            (bf16.activations_bytes + outputs) / GIB,
            "GiB",
            note=f"{bf16.activations_bytes / GIB:.1f} of ours, which keep none, and {outputs / GIB:.1f} of outputs",
        ),
        Row("saved by keeping no experts' outputs", 26.3, outputs / GIB, "GiB"),
        Row("saved by recomputing MLA's up-projections", 30.4, saved("mla_up"), "GiB"),
        Row("saved by recomputing norms", 8.2, saved("norm"), "GiB"),
        Row("saved by recomputing SwiGLU", 3.8, saved("moe_act"), "GiB"),
    ]


def main() -> None:
    """Print and write the comparison."""
    recipe = compose(["recipe=dsv3_671b"])
    plan = make_plan(recipe, 2048, measure=estimate_stages)
    sections = {
        "DeepSeek-V3 on 2,048 H800 (arXiv 2505.09343 table 4), roofline alone": step_rows(plan),
        "The same table, its own chunk times given to the simulator": with_published_chunk_times(),
        "Published profile of one overlapped pair (deepseek-ai/profile-data)": profile_rows(),
        "Tokens a second and GPU of other frameworks": run_rows(held_out=False),
        "Held out: no constant was settled by them": run_rows(held_out=True),
        "Memory of a GPU, arXiv 2603.07685": memory_rows(),
    }
    for title, rows in sections.items():
        print(f"\n{title}\n")
        print("| | published | predicted | residual | |\n|---|---|---|---|---|")
        for row in rows:
            note = "; ".join(filter(None, ("used to build the model" if row.used else "", row.note)))
            print(f"| {row.what} | {row.published:g} {row.unit} | {row.predicted:.4g} | {row.residual:+.1%} | {note} |")
    results = {t: [asdict(r) | {"residual": r.residual} for r in rows] for t, rows in sections.items()}
    path = Path(__file__).parent / "results" / "planner_truth.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
