"""How does the cost of a step grow with the model, the batch and the ranks?

One property at a time is doubled from dsv3_tiny, everything else stays; the exponent is the slope of log(seconds)
over log(property), by least squares. What it should be at most: 1 for layers, microbatches and sequence length with
attention's 2 mixed in, near 0 for experts (each token still meets four) and for ranks on one core (the same work, cut
up). Every point is a process of its own with one thread; all points of a property take turns, medians.

    python -m benchmarks.scaling [repeats=3] [output=FILE.json] [plot=FILE.svg]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, PositiveInt

from benchmarks.sides import Side, in_turns
from benchmarks.work import TINY, machine, ours
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

WITH_MTP = tuple(word for word in TINY if "nextn" not in word)
SMALL_STEP = (*WITH_MTP, "optim.micro_batch=1", "optim.global_batch=4")
ONE_GROUP = ("model.n_group=1", "model.topk_group=1")
# property -> (values, the words of one value, the most its exponent may be, and why)
SWEEPS: dict[str, tuple[tuple[int, ...], Any, float, str]] = {
    "layers": ((2, 4, 8, 16), lambda n: (f"model.num_hidden_layers={n}",), 1.0, "the same work a layer"),
    "experts": ((8, 16, 32, 64), lambda n: (*ONE_GROUP, f"model.n_routed_experts={n}"), 0.5, "a token meets four"),
    "sequence": ((128, 256, 512, 1024), lambda n: (f"data.sequence_length={n}",), 1.3, "attention grows by its square"),
    "microbatches": ((2, 4, 8, 16), lambda n: (f"optim.global_batch={n}",), 1.0, "the same work each"),
    "MTP depths": ((1, 2, 4, 8), lambda n: (f"model.num_nextn_predict_layers={n}",), 1.0, "a layer and a head each"),
}
RANKS = {1: (), 2: ("parallel.pipeline=2",), 4: ("parallel.pipeline=4", "model.num_hidden_layers=4")}


class Arguments(BaseModel):
    """What the benchmark takes."""

    repeats: PositiveInt = 3
    output: str = "benchmarks/results/scaling.json"
    plot: str = "docs/img/scaling.svg"


def measured(sides: dict[int, Side], repeats: int) -> dict[str, Any]:
    """Return seconds a step and memory of each value, and the exponent."""
    found = in_turns({str(value): side for value, side in sides.items()}, repeats, 2, warm_up=1)
    memory = [side.memory_bytes() for side in sides.values()]
    for side in sides.values():
        side.close()
    seconds = [median(values) for values in found.values()]
    return {
        "values": list(sides),
        "seconds": seconds,
        "memory_bytes_per_process": memory,
        "exponent": exponent(list(sides), seconds),
    }


def exponent(values: list[int], seconds: list[float]) -> float:
    """Return the slope of log(seconds) over log(values)."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def draw(found: dict[str, dict[str, Any]], path: str) -> None:
    """Plot seconds a step over each property, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.4), layout="constrained")
    for axis, (name, one) in zip(axes.flat, found.items()):
        axis.loglog(one["values"], one["seconds"], "o-", color="#1f5fa8")
        axis.set_title(f"{name}: exponent {one['exponent']:.2f}", loc="left", fontsize=10)
        axis.set_xticks(one["values"], [str(v) for v in one["values"]], minor=False)
        axis.minorticks_off()
        axis.set_ylabel("seconds a step")
        axis.grid(alpha=0.25)
    figure.savefig(path, format="svg")


def main(arguments: list[str]) -> int:
    """Measure, print a table, write figures and plot."""
    given = parse_arguments(Arguments, arguments)
    before, found = machine(), {}
    print("| a step grows with | exponent | at most | because |\n|---|---|---|---|")
    for name, (values, words, most, why) in SWEEPS.items():
        sides = {value: Side(ours, (*SMALL_STEP, *words(value)), threads=1) for value in values}
        found[name] = measured(sides, given.repeats) | {"at_most": most}
        print(f"| {name} {values[0]}-{values[-1]} | {found[name]['exponent']:.2f} | {most} | {why} |", flush=True)
    ranks = {n: Side(ours, (*SMALL_STEP, *words), world=n, threads=1) for n, words in RANKS.items()}
    found["pipeline ranks"] = measured(ranks, given.repeats) | {"at_most": 0.5}
    print(f"| pipeline ranks 1-4 | {found['pipeline ranks']['exponent']:.2f} | 0.5 | more ranks than cores |")
    summary = {"machine": before, "command": f"python -m benchmarks.scaling repeats={given.repeats}", **found}
    Path(given.output).write_text(json.dumps(summary, indent=1) + "\n")
    draw(found, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
