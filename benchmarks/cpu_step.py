"""How fast is a training step on a CPU: beside transformers, beside the machine's own matrix product, on two processes.

Fair because: same shapes, batch, precision (float32) and threads; forward, backward, clipping and AdamW on both sides;
one run, sides alternated, warm-up thrown away, medians. transformers has its fastest settings (benchmarks/work.py).
Ours is the trainer's step. The rate counts attention's causal half, as the paper's MFU does, and no recomputation.

    python -m benchmarks.cpu_step [repeats=5] [compile=false] [output=FILE.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, Field, PositiveInt

from benchmarks.sides import Side, in_turns
from benchmarks.work import SMALL_100M, TINY, machine, matrix_product, ours, transformers
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

CASES = {"tiny": (TINY, 4), "100M": (SMALL_100M, 1)}  # recipe, steps of a turn
TWO_PROCESSES = {"tiny": (), "100M": ("optim.global_batch=8",)}  # gradients are exchanged once a step


class Arguments(BaseModel):
    """What the benchmark takes."""

    repeats: PositiveInt = 5
    compile: bool = Field(False, description="transformers under torch.compile too (minutes of compilation)")
    output: str = "benchmarks/results/cpu_step.json"


def beside_transformers(name: str, given: Arguments) -> dict[str, Any]:
    """Return seconds a step of both, and the rate beside a plain product's."""
    words, steps = CASES[name]
    sides = {"ours": Side(ours, words), "transformers": Side(transformers, words)}
    if given.compile:
        sides["transformers, compiled"] = Side(transformers, words, True)
    sides["matrix product"] = Side(matrix_product)
    found = in_turns(sides, given.repeats, {s: 10 if s == "matrix product" else steps for s in sides})
    facts = sides["ours"].facts
    memory = {side: sides[side].memory_bytes() for side in sides}
    for side in sides.values():
        side.close()
    peak = 2 * 2048**3 / median(found["matrix product"])
    operations = facts["tokens"] * facts["flops_per_token"]
    best = min(median(v) for side, v in found.items() if side.startswith("transformers"))
    return {
        **facts,
        "seconds": found,
        "tokens_per_second": {s: facts["tokens"] / median(v) for s, v in found.items() if s != "matrix product"},
        "memory_bytes": memory,
        "ratio": best / median(found["ours"]),
        "matrix_product_gflops": peak / 1e9,
        "share_of_matrix_product": operations / median(found["ours"]) / peak,
        "share_of_matrix_product_transformers": operations / best / peak,
    }


def on_two_processes(name: str, given: Arguments) -> dict[str, Any]:
    """Return how much faster two processes of one thread are than one."""
    words, steps = CASES[name]
    words = (*words, *TWO_PROCESSES[name])
    sides = {
        "one": Side(ours, words, threads=1),
        "DP 2": Side(ours, words, world=2, threads=1),
        "EP 2": Side(ours, (*words, "parallel.expert=2"), world=2, threads=1),
    }
    found = in_turns(sides, min(3, given.repeats), steps, warm_up=1)
    for side in sides.values():
        side.close()
    return {"seconds": found, **{s: median(found["one"]) / median(found[s]) for s in ("DP 2", "EP 2")}}


def main(arguments: list[str]) -> int:
    """Measure, print a table, write the figures."""
    given = parse_arguments(Arguments, arguments)
    found: dict[str, Any] = {"machine": machine()}
    print("| configuration | what | figure |\n|---|---|---|")
    for name in CASES:
        one = found[name] = beside_transformers(name, given)
        speeds = ", ".join(f"{side} {rate:,.0f}" for side, rate in one["tokens_per_second"].items())
        print(f"| {name} | beside transformers ({speeds} tokens/s) | {one['ratio']:.2f} x |")
        theirs = one["share_of_matrix_product_transformers"]
        what = (
            f"of the rate of a float32 product, {one['matrix_product_gflops']:.0f} GFLOP/s; transformers {theirs:.0%}"
        )
        print(f"| {name} | {what} | {one['share_of_matrix_product']:.0%} |", flush=True)
        two = found[f"{name}, two processes"] = on_two_processes(name, given)
        for layout in ("DP 2", "EP 2"):
            print(f"| {name} | {layout} beside one process, one thread each | {two[layout]:.2f} x |", flush=True)
    found["command"] = f"python -m benchmarks.cpu_step repeats={given.repeats} compile={str(given.compile).lower()}"
    Path(given.output).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
