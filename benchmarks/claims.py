"""What multi-token prediction and the ways to balance experts do to the loss, and what MTP costs a step.

Trains variants of recipe=dsv3_tiny on the same samples of the Python standard library in the same order, one thread
each, two at a time, and compares held-out loss, MaxVio, and what the routers dropped. Seconds a step by MTP depth are
measured apart, in turns on an idle machine; from both comes the loss at equal time: a variant whose step takes c times
as long is read at 1/c of the steps. Goes on from what is in the directory.

    python -m benchmarks.claims [steps=200] [directory=runs/claims] [output=FILE.json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
from pydantic import BaseModel, PositiveInt

from benchmarks.sides import Side, in_turns
from benchmarks.work import TINY, machine, ours
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

DEPTH = "model.num_nextn_predict_layers={}"
NO_BIAS, EVERY = "optim.bias_speed=0", "run.evaluate_every_steps=20"
VARIANTS: dict[str, tuple[str, ...]] = {
    "as published: MTP 1, bias": (),
    "MTP 0": (DEPTH.format(0),),
    "MTP 2": (DEPTH.format(2),),
    "auxiliary loss 0.01 instead of the bias": (NO_BIAS, "optim.balance_weight=0.01"),
    "no balancing": (NO_BIAS, "optim.balance_weight=0"),
}
LAST = 20  # steps over which MaxVio is averaged


class Arguments(BaseModel):
    """What the benchmark takes."""

    steps: PositiveInt = 200
    repeats: PositiveInt = 5
    directory: str = "runs/claims"
    output: str = "benchmarks/results/claims.json"


def train(name: str, given: Arguments) -> dict[str, Any]:
    """Train one variant, or go on, and return what became of it."""
    folder = Path(given.directory) / "".join(c if c.isalnum() else "_" for c in name)
    words = ["recipe=dsv3_tiny", EVERY, f"run.steps={given.steps}", f"run.directory={folder}", *VARIANTS[name]]
    words += ["logging.wandb=disabled", "logging.console_every_steps=50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "launcher/pretrain.py", *words], cwd=ROOT, check=True, env=environment)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    held_out = {e["step"]: e["held_out_loss"] for e in events if e["event"] == "held_out"}
    return {
        "held_out": held_out,
        "loss": held_out[given.steps],
        "max_violation": sum(line["max_violation"] for line in lines[-LAST:]) / LAST,
        "max_violation_running": lines[-1]["max_violation_running"],
    }


def costs(repeats: int) -> dict[str, float]:
    """Return seconds a step by MTP depth over those without, medians of turns."""
    words = [word for word in TINY if "nextn" not in word]
    sides = {str(depth): Side(ours, (*words, DEPTH.format(depth))) for depth in (0, 1, 2, 4)}
    found = in_turns(sides, repeats, 2)
    for side in sides.values():
        side.close()
    return {depth: median(seconds) / median(found["0"]) for depth, seconds in found.items()}


def at_step(held_out: dict[int, float], step: float) -> float:
    """Return the held-out loss at a step between two that were measured."""
    before = max(s for s in held_out if s <= step)
    after = min(s for s in held_out if s >= step)
    share = (step - before) / (after - before) if after > before else 0.0
    return held_out[before] + share * (held_out[after] - held_out[before])


def main(arguments: list[str]) -> int:
    """Train, measure, print two tables, write the figures."""
    given = parse_arguments(Arguments, arguments)
    with ThreadPoolExecutor(2) as pool:
        variants = dict(zip(VARIANTS, pool.map(lambda name: train(name, given), VARIANTS)))
    before, cost = machine(), costs(given.repeats)
    base = next(iter(variants.values()))
    print("\n| variant | held-out loss at equal tokens | MaxVio of a batch | MaxVio, running |\n|---|---|---|---|")
    for name, one in variants.items():
        print(f"| {name} | {one['loss']:.3f} | {one['max_violation']:.2f} | {one['max_violation_running']:.2f} |")
    print("\n| MTP depths | seconds a step | held-out loss at equal time |\n|---|---|---|")
    for depth, name in (("0", "MTP 0"), ("1", next(iter(VARIANTS))), ("2", "MTP 2"), ("4", None)):
        # The time of the whole run without MTP: the slower variants are read before their end.
        equal = f"{at_step(variants[name]['held_out'], given.steps / cost[depth]):.3f}" if name else "not trained"
        print(f"| {depth} | {cost[depth]:.2f} x | {equal} |")
    summary = {"machine": before, "steps": given.steps, "variants": variants, "step_cost": cost, "base": base["loss"]}
    Path(given.output).write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
