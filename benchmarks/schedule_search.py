"""What ``parallel.schedule=auto`` finds beside DualPipe: from which gain on pairing pays, and unequal stages.

    python -m benchmarks.schedule_search [output=FILE]

Simulated makespans, not measurements: F = I = W = 1 unless said otherwise, DualPipe's memory (P + 1 live microbatches).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from parallel.pipeline.simulator import Times, simulate
from parallel.schedules import make_schedule, placement
from parallel.search import search
from parallel.search.annealing import anneal

DEEPSEEK = {"forward": 57.0, "input_grad": 82.0, "weight_grad": 42.0, "overlapped": 140.0}
LONG = 60_000  # simulations of the annealing in the second table


def crossing(ranks: int, many: int) -> dict[str, float]:
    """Return the overlapped time below which DualPipe is shorter than bidirectional zero-bubble, and both at FB = 3."""
    place = placement("auto", ranks, many)
    split = min(makespan for name, makespan in search(place, Times.of(ranks), evaluations=0).tried if "split" in name)
    dual = make_schedule("dualpipe", ranks, many)

    def of_dualpipe(overlapped: float) -> float:
        return simulate(dual, Times.of(ranks, overlapped=overlapped)).makespan

    low, high = 1.5, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if of_dualpipe(middle) < split else (low, middle)
    return {
        "ranks": ranks,
        "microbatches": many,
        "dualpipe": of_dualpipe(3.0),
        "split": split,
        "bound": many * 3 + ranks / 2 - 1,
        "crossing": low,
    }


def unequal(ranks: int, many: int, last: float) -> dict[str, float]:
    """Return makespans with DeepSeek's times and a last stage that costs ``last`` times the others."""
    times = Times.of(ranks, cost=[1.0] * (ranks - 1) + [last], **DEEPSEEK)
    dual = make_schedule("dualpipe", ranks, many)
    quick = search(placement("auto", ranks, many), times).schedule
    best = anneal(dual, times, ranks + 1, evaluations=LONG, seed=1)
    found = {name: simulate(s, times).makespan for name, s in (("dualpipe", dual), ("auto", quick), ("long", best))}
    return {"ranks": ranks, "microbatches": many, "last": last, **found}


def main() -> None:
    """Print both tables."""
    first = [crossing(p, m) for p, m in ((4, 8), (4, 32), (8, 20), (8, 64), (16, 32), (16, 120))]
    print(
        "| P | M | DualPipe, FB = 3 | zero-bubble | lower bound | DualPipe wins below FB = |\n|---|---|---|---|---|---|"
    )
    for row in first:
        print(
            f"| {row['ranks']} | {row['microbatches']} | {row['dualpipe']:g} | {row['split']:g} | {row['bound']:g} | "
            f"{row['crossing']:.2f} |"
        )
    second = [unequal(8, 20, last) for last in (1.0, 1.2, 1.3, 1.4, 1.5)]
    print("\n| last stage | DualPipe | auto (10 s) | gain | long search | gain |\n|---|---|---|---|---|---|")
    for row in second:
        gains = [f"{100 * (1 - row[name] / row['dualpipe']):.1f}%" for name in ("auto", "long")]
        makespans = [f"{row[name]:.0f}" for name in ("dualpipe", "auto", "long")]
        print(f"| x {row['last']} | {makespans[0]} | {makespans[1]} | {gains[0]} | {makespans[2]} | {gains[1]} |")
    output = next((word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith("output=")), None)
    if output:
        Path(output).write_text(json.dumps({"overlap": first, "unequal": second}, indent=1))


if __name__ == "__main__":
    main()
