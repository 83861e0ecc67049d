"""What a save costs a run: the first part of benchmarks/checkpoints.py.

Steps with a synchronous save, with an asynchronous one and with none take turns in one process on one model, so each
meets the same machine; the cost is the difference to none, of medians.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

BASE = [
    "data=synthetic",
    "logging.wandb=disabled",
    "data.sequence_length=64",
    "optim.micro_batch=2",
    "optim.global_batch=2",
]


def saves(place: Path, repeats: int, steps: int, hidden: int) -> dict[str, float]:
    """Return median seconds of a few steps with each kind of save, the stall that the run measures, and bytes."""
    import torch

    from dsv3_megatron.checkpoint.save import Flags, Saver
    from dsv3_megatron.data.source.samples import Synthetic, step_batches
    from dsv3_megatron.train.build import build_parts
    from dsv3_megatron.train.step import StepValues, train_step
    from launcher.command_line.compose import compose
    from parallel.groups import start_processes, stop_processes
    from parallel.world import World

    shape = [f"model.hidden_size={hidden}", "model.vocab_size=8192", f"model.moe_intermediate_size={hidden}"]
    recipe = compose([*BASE, *shape])
    values = StepValues(learning_rate=1e-4, mtp_weight=0.3, bias_speed=0.001, balance_weight=1e-4)
    seconds: dict[str, list[float]] = {"none": [], "synchronous": [], "asynchronous": []}
    told: dict[str, list[dict]] = {"synchronous": [], "asynchronous": []}
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        source, number = Synthetic(recipe.model.vocab_size, 64, seed=1), 0

        def some_steps(saver: Saver | None) -> None:
            nonlocal number
            for _ in range(steps):
                batches = step_batches(source, first=2 * number, global_batch=2, micro_batch=2, dp_rank=0, dp=1)
                train_step(parts, batches, values)
                number += 1
                if saver is not None:
                    saver.advance(Flags(*saver.flags()), number)

        def saver_of(kind: str) -> Saver:
            settings = recipe.checkpoint.model_copy(update={"asynchronous": kind == "asynchronous", "keep": 1})
            return Saver(place / kind, settings, parts, "", lambda name, event: told[kind].append(event))

        savers = {kind: saver_of(kind) for kind in told}
        some_steps(None)
        for repeat in range(repeats + 1):
            for kind in seconds if repeat % 2 else reversed(seconds):
                saver, begin = savers.get(kind), time.perf_counter()
                if saver is not None:
                    saver.save({"step": number, "tokens": 0, "samples": 0, "skipped": 0})
                some_steps(saver)
                if saver is not None:
                    saver.finish(number)
                if repeat:  # the first of each is warm-up
                    seconds[kind].append(time.perf_counter() - begin)
    finally:
        stop_processes()
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    return {
        "checkpoint_bytes": told["synchronous"][-1]["bytes"],
        "steps": steps,
        "seconds_without": medians["none"],
        **{f"lost_seconds_{k}": medians[k] - medians["none"] for k in told},
        **{f"stall_seconds_{k}": statistics.median(e["stall_seconds"] for e in told[k][1:]) for k in told},
        "spread_seconds": {kind: [min(found), max(found)] for kind, found in seconds.items()},
    }
