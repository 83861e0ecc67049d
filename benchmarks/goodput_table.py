"""What failures and saves leave of the time: writes the table of docs/checkpoints.md from the planner.

    python -m benchmarks.goodput_table

No GPU and no training; what it rests on is in docs/checkpoints.md. A test keeps the page in step with the planner.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.page_tables import filled
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.preflight.layout import world_of
from launcher.command_line.compose import compose
from parallel.units import show_bytes, show_duration

PAGE = Path("docs/checkpoints.md")
_NODE = "cluster.storage_gigabytes_per_second=2"
ROWS = (
    "recipe=dsv3_671b",
    "recipe=dsv3_671b checkpoint.every_minutes=auto",
    "recipe=dsv3_671b checkpoint.memory_every_steps=15",
    "recipe=dsv3_671b checkpoint.every_minutes=0 checkpoint.every_steps=500",
    "recipe=dsv3_671b checkpoint.every_minutes=auto checkpoint.asynchronous=false",
    "recipe=dsv3_671b cluster.storage_gigabytes_per_second=25 checkpoint.every_minutes=auto",
    "recipe=dsv3_671b cluster=h100_1024 checkpoint.every_minutes=auto",
    "recipe=dsv3_671b_128k",
    "recipe=kimi_k2",
    f"recipe=dsv3_1b {_NODE}",
    f"recipe=dsv3_16b {_NODE}",
    f"recipe=moonlight_16b {_NODE}",
    f"recipe=glm_4_7_flash {_NODE}",
)
_HEAD = (
    "| command: `plan.py` ... | GPUs | failures a day | checkpoint | a save stops training, complete after | "
    "to the next step after a failure | a save every, best | useful, best |\n|---|---|---|---|---|---|---|---|"
)


def plan_of(words: str) -> Plan:
    """Return the plan of a command's words."""
    recipe = compose(words.split())
    return make_plan(recipe, world_of(recipe), measure=estimate_stages)


def table() -> str:
    """Return the rows' plans as a Markdown table."""
    return "\n".join([_HEAD, *(_line(words, plan_of(words)) for words in ROWS)])


def _line(words: str, plan: Plan) -> str:
    found = plan.goodput
    first = found.saves[0]  # the kind that most failures need
    costs = first.costs
    return (
        f"| `{words}` | {plan.layout.world_size:,} {plan.recipe.cluster.name.partition('_')[0].upper()} | "
        f"{found.failures_per_day:.2g} | {show_bytes(found.checkpoint_bytes)} | "
        f"{costs.stall_seconds:.2f} s, {show_duration(costs.seconds)} | {show_duration(costs.recovery_seconds)} | "
        f"{show_duration(first.planned_seconds)}, {show_duration(first.best_seconds)} | "
        f"{found.share:.2%}, {found.best_share:.2%} |"
    )


def with_table(page: str) -> str:
    """Return the page with its table written anew."""
    return filled(page, {"goodput": table()})


def main() -> int:
    """Write the page."""
    PAGE.write_text(with_table(PAGE.read_text()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
