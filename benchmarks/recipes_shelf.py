"""What every recipe with a purpose takes: writes the tables of docs/recipes_shelf.md from the planner.

    python -m benchmarks.recipes_shelf

No GPU and no training: memory by formulae, time by published kernels and links (docs/planning.md), money by the
cluster's ``dollars_per_gpu_hour``. A test keeps the page in step with the planner.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page_tables import filled
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.preflight.layout import world_of
from launcher.command_line.compose import compose
from parallel.units import GIB, show_count, show_duration

PAGE = Path("docs/recipes_shelf.md")


@dataclass(frozen=True)
class Row:
    """A plan to show: the words of a command, and what it is for."""

    words: str
    purpose: str


PURPOSES = (
    Row(
        "recipe=dsv3_150m precision=bf16 optim.micro_batch=16 cluster=h100_1",
        "a first model from nothing",
    ),
    Row(
        "recipe=dsv3_150m optim=dsv3_150m_1b run.tokens=1B precision=bf16 cluster=h100_1",
        "the same on twenty times the text",
    ),
    Row("recipe=dsv3_1b cluster=h200_1", "a small model from nothing, one GPU"),
    Row("recipe=dsv3_1b", "the same on a node"),
    Row("recipe=dsv3_16b", "16B from nothing, a node"),
    Row("recipe=moonlight_16b", "Moonlight-16B-A3B trained on"),
    Row("recipe=glm_4_7_flash", "GLM-4.7-Flash trained on"),
    Row("recipe=kimi_k2", "Kimi-K2's shape on 2,048 GPUs"),
)

_ONE = "parallel=single"
FITS = (
    Row(f"recipe=moonlight_16b cluster=h200_1 {_ONE}", "Moonlight on one GPU of 141 GB"),
    Row(f"recipe=moonlight_16b cluster=h200_1 {_ONE} model.freeze=[experts]", "all but its routed experts"),
    Row(
        f"recipe=moonlight_16b cluster=h100_1 {_ONE} model.freeze=[experts] optim.micro_batch=1",
        "the same on one of 80 GB",
    ),
    Row("recipe=moonlight_16b cluster.gpus_per_node=4 parallel.expert=4", "the whole of it on four of 80 GB"),
    Row(
        "recipe=moonlight_16b cluster.gpus_per_node=4 parallel.expert=4 parallel.tensor=2 optim.micro_batch=1",
        "the same with tensor parallelism",
    ),
    Row("recipe=glm_4_7_flash parallel.tensor=1", "GLM-4.7-Flash on eight without tensor parallelism"),
    Row("recipe=glm_4_7_flash parallel.tensor=1 parallel.recompute=[full]", "the same, whole layers computed again"),
    Row(
        f"recipe=glm_4_7_flash cluster=h200_1 {_ONE} parallel.tensor=1 model.freeze=[experts]",
        "GLM-4.7-Flash on one GPU of 141 GB, its experts frozen",
    ),
    Row("recipe=moonlight_16b precision.moments=fp32", "moments in float32 instead of BF16"),
)


def plan_of(words: str) -> Plan:
    """Return the plan of a command's words."""
    recipe = compose(words.split())
    return make_plan(recipe, world_of(recipe), measure=estimate_stages)


def table(rows: tuple[Row, ...]) -> str:
    """Return the rows' plans as a Markdown table."""
    head = (
        "| command: `plan.py` ... | what for | GPUs | parameters, activated | GiB of a GPU | tokens | time | "
        "GPU-hours | dollars |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(_line(row, plan_of(row.words)) for row in rows)])


def _line(row: Row, plan: Plan) -> str:
    counts, tightest, recipe = plan.parameters, plan.tightest, plan.recipe
    hours = plan.gpu_hours_per_trillion_tokens * plan.budget_tokens / 1e12
    fits = "" if plan.fits else " **does not fit**"
    limit = f" of {tightest.limit_bytes / GIB:.0f}" if tightest.limit_bytes else ""
    return (
        f"| `{row.words}` | {row.purpose} | {plan.layout.world_size:,} {_gpu(recipe.cluster.name)} | "
        f"{show_count(counts.main + counts.mtp)}, {show_count(counts.activated_per_token)} | "
        f"{tightest.total_bytes / GIB:.1f}{limit}{fits} | {show_count(plan.budget_tokens)} | "
        f"{show_duration(hours / plan.layout.world_size * 3600)} | {show_count(hours)} | "
        f"{show_count(hours * recipe.cluster.dollars_per_gpu_hour)} |"
    )


def _gpu(cluster: str) -> str:
    return cluster.partition("_")[0].upper()


def with_tables(page: str) -> str:
    """Return the page with its tables written anew."""
    return filled(page, {"purposes": table(PURPOSES), "fits": table(FITS)})


def main() -> int:
    """Write the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
