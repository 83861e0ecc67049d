"""What a step and its update cost under AdamW and under Muon, in turns: the trainer's own step on made-up text.

With one thread on a CPU the clock is the process's own CPU time, so that others on the machine, whose load changes, do
not count. Several threads spin while they wait for each other, and a GPU works beside the process: there it is wall
time, and the machine must be idle.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from benchmarks.optimizer_runs import OPTIMIZERS
from benchmarks.sides import Side, in_turns
from benchmarks.work import ours


def clocked(words: tuple[str, ...], device: str, threads: int) -> Any:
    """Return the trainer's step, which notes the seconds of itself and of its update: the optimizer's, after the
    gradients' norm is known."""
    import torch

    step = ours(words, device)
    optimizer = step.parts.optimizer
    update, spent = optimizer.step_with_ready_grads, [0.0]

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if (device, threads) == ("cpu", 1) else time.perf_counter()

    def clocked_update() -> bool:
        start = now()
        done = update()
        spent[0] = now() - start
        return done

    def clocked_step() -> None:
        start = now()
        step()
        clocked_step.noted.append((now() - start, spent[0]))

    optimizer.step_with_ready_grads = clocked_update
    clocked_step.noted, clocked_step.facts = [], step.facts
    return clocked_step


def cost(words: tuple[str, ...], *, threads: int, repeats: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Return seconds of steps and updates under both optimizers, ``repeats`` turns of ``steps`` steps, and ratios of
    their medians. The first step of each, which makes the states, is thrown away."""
    words = (*(word for word in words if not word.startswith("data=")), "data=synthetic")
    sides = {
        name: Side(clocked, (*words, f"optim.name={name}"), device, threads, threads=threads) for name in OPTIMIZERS
    }
    try:
        in_turns(sides, repeats, steps, warm_up=1)
        noted = {name: side.noted()[1:] for name, side in sides.items()}
        facts = next(iter(sides.values())).facts
    finally:
        for side in sides.values():
            side.close()
    whole = {name: [step for step, _ in pairs] for name, pairs in noted.items()}
    update = {name: [seconds for _, seconds in pairs] for name, pairs in noted.items()}
    medians = {name: median(values) for name, values in whole.items()}
    return {
        **facts,
        "clock": "CPU seconds" if (device, threads) == ("cpu", 1) else "wall seconds",
        "threads": threads,
        "step_seconds": whole,
        "update_seconds": update,
        "step_median": medians,
        "update_median": {name: median(values) for name, values in update.items()},
        "update_share": {name: median(update[name]) / medians[name] for name in sides},
        "step_ratio": medians["muon"] / medians["adamw"],
    }
