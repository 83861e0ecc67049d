"""What do starting, saving and resuming cost as the ranks grow, and what would they cost on 2,048?

Real runs of 2, 4, 8, 16 and 32 ranks over gloo on this machine, each with as much on a rank as the next: every file
that is opened or asked for, every byte of a checkpoint, every message to the rendezvous store, every process group and
collective is counted, by rank and phase (testing/counting). How each count grows is fitted, and reckoned for 2,048
ranks of recipe=dsv3_671b with that recipe's own sizes. Process groups of 2,048 ranks are made on a world without
messages.
Memory: 0.45 GB a rank, 14 GB at 32.

    python -m benchmarks.at_scale [ranks=2,4,8,16,32] [column=after] [output=FILE.json] [page=docs/scale.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from benchmarks import scale_page
from benchmarks.scale_groups import groups_at_scale, groups_of, starts
from benchmarks.scale_lives import imports, layers_of_a_rank, lives_of, words_of
from benchmarks.work import machine
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

KEPT = ("start", "build", "load", "save", "beside", "end")


class Arguments(BaseModel):
    """What the benchmark takes."""

    ranks: str = Field("2,4,8,16,32", description="worlds to run, separated by commas")
    measure: bool = Field(True, description="false = run nothing, only write the page's tables anew")
    column: str = Field("after", description="name of this measurement; another one of the same name is replaced")
    output: str = "benchmarks/results/at_scale.json"
    page: str = Field("docs/scale.md", description="page whose tables are written anew")


def measured(world: int) -> dict[str, Any]:
    """Return what both lives of a world counted, name by name of every rank, and the bounds."""
    waits, beside = lives_of(world), lives_of(world, asynchronous=True)
    lives = [
        {
            phase: {name: [rank["counts"].get(phase, {}).get(name, 0) for rank in life] for name in sorted(names)}
            for phase, names in _names(life)
        }
        for life in waits
    ]
    written = lives[0]["save"]["written/checkpoint"]
    share = sum(written) / world
    read = [
        sum(of) for of in zip(*(lives[1]["load"].get(f"{how}/checkpoint", [0] * world) for how in ("read", "mapped")))
    ]
    states = [rank["state_bytes"] for rank in waits[1]]
    return {
        "layout": waits[0][0]["layout"],
        "share_bytes": share,
        "parameters": waits[0][0]["parameters"],
        "layers": layers_of_a_rank(world),
        "lives": lives,
        "joined": groups_of(words_of(world), world)["joined"],
        "groups_used": sorted({(name, size) for rank in waits[0] for name, size, _ in rank["used"]}),
        "seconds": {
            phase: max(rank["costs"].get(phase, {"seconds": 0})["seconds"] for rank in waits[life])
            for phase, life in (("start", 0), ("build", 0), ("load", 1), ("save", 0))
        },
        "peak_bytes": max(cost["peak_bytes"] for rank in waits[0] for cost in rank["costs"].values()),
        "bounds": {
            "read_over_checkpoint": sum(read) / sum(written),
            "read_over_state": max(r / s for r, s in zip(read, states)),
            "written_over_even": max(written) / share,
            "growth_over_share": max(rank["costs"]["save"]["growth_bytes"][0] for rank in waits[0]) / share,
            "growth_beside_over_share": max(max(rank["costs"]["save beside"]["growth_bytes"][1:]) for rank in beside[0])
            / share,
        },
    }


def _names(life: list[dict[str, Any]]) -> Iterator[tuple[str, set[str]]]:
    """Yield the phases that are kept, and what was counted in them on any rank; not what a machine keeps for itself."""
    for phase in sorted(KEPT):
        names = {name for rank in life for name in rank["counts"].get(phase, {})}
        yield phase, {name for name in names if not name.endswith("/system")}


def as_text(results: dict[str, Any]) -> str:
    """Return results as JSON with a line for each phase of each life, of which one reads what differs."""
    text = json.dumps(results, separators=(",", ":"))
    for key in ("lives", "layout", "groups", "worlds", "machine", *KEPT):
        text = text.replace(f'"{key}":', f'\n"{key}":')
    return text + "\n"


def main(arguments: list[str]) -> int:
    """Measure, write the figures and the tables of the page."""
    given = parse_arguments(Arguments, arguments)
    output = Path(given.output)
    results = json.loads(output.read_text()) if output.exists() else {"columns": {}}
    if given.measure:
        results["columns"][given.column] = column = {
            "machine": machine(),
            "command": f"python -m benchmarks.at_scale ranks={given.ranks} column={given.column}",
            "imports": imports(),
            "groups": groups_at_scale(),
            "worlds": {},
        }
        results["starts"] = starts()
        for world in map(int, given.ranks.split(",")):
            column["worlds"][str(world)] = measured(world)
            print(f"{world} ranks: {json.dumps(column['worlds'][str(world)]['bounds'])}", flush=True)
            output.write_text(as_text(results))
    page = Path(given.page)
    page.write_text(scale_page.with_tables(page.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
