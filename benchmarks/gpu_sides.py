"""One side of the GPU benchmark, in a process of its own: plain megatron-core, transformers, or our stages in pieces.

    python -m benchmarks.gpu_sides side=megatron precision=fp8 output=FILE [steps=12] [settings=KEY=VALUE,...]

*megatron*: plain megatron-core (benchmarks/plain_megatron.py), with nothing of ours but the recipe's numbers;
``settings`` are more fields of its configuration.

*transformers*: DeepseekV3ForCausalLM with weights, gradients and moments in BF16 and torch's fused AdamW, which is less
work and less memory than the others' FP32 master weights and gradients: what is faster than it is so in spite of that.
``settings=attention=...`` picks its attention (sdpa), ``settings=compiled=true`` compiles.

*stages*: our trainer's forward, input gradient and weight gradient of one microbatch, each waited for: what the
planner's ``calibrate`` reads. *kernels*: the longest kernels of our step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from benchmarks import work
from benchmarks.gpu_check.sizing import sized_here
from benchmarks.plain_megatron import megatron
from dsv3_megatron.megatron.libraries import share_cudnn
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.compose import compose


class Arguments(BaseModel):
    """What can be said on the command line."""

    side: Literal["megatron", "transformers", "stages", "kernels"] = Field(description="what to measure")
    output: Path = Field(description="JSON file to write")
    precision: Literal["bf16", "fp8"] = Field("bf16", description="format of products")
    backend: Literal["te", "torch"] = Field("te", description="of side=stages and side=kernels")
    steps: int = Field(12, ge=6, description="steps; the first third is thrown away")
    recipe: str = Field("", description="what to train; empty = dsv3_one_gpu, as much of it as this GPU holds")
    settings: str = Field("", description="of the side alone: KEY=VALUE,KEY=VALUE")


def stage_seconds(words: tuple[str, ...], steps: int, device: str = "cuda") -> dict[str, float]:
    """Return the medians of our forward, input gradient and weight gradient of one microbatch of one stage."""
    import torch

    step = work.ours((*words, "parallel.schedule=zb1p"), device)
    found: dict[str, list[float]] = {"F": [], "I": [], "W": []}

    def clocked(run: Callable, kind: str) -> Callable:
        def call(given: Any) -> None:
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(given)
            torch.cuda.synchronize()
            found[kind].append(time.perf_counter() - start)

        return call

    for name, kind in (("forward", "F"), ("backward", "I"), ("weight_gradient", "W")):  # zb1p has no whole backward
        setattr(step.stages, name, clocked(getattr(step.stages, name), kind))
    for _ in range(steps):
        step()
    kept = {kind: statistics.median(times[len(times) // 3 :]) for kind, times in found.items()}
    return {"forward": kept["F"], "input_grad": kept["I"], "weight_grad": kept["W"]}


def step_seconds(step: Callable[[], Any], steps: int) -> float:
    """Return the median wall time of a step, the device waited for."""
    import torch

    found = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[steps // 3 :])


def longest_kernels(step: Callable[[], Any], lines: int | None = 15) -> list[tuple[float, int, str]]:
    """Return (milliseconds, calls, name) of the device's kernels in one step, longest first; ``lines`` None = all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    # The host's calls to CUDA are rows too, without time on the device: counting them would count each launch twice.
    ran = [row for row in found.key_averages() if row.self_device_time_total > 0]
    rows = sorted(ran, key=lambda row: -row.self_device_time_total)[:lines]
    return [(round(row.self_device_time_total / 1e3, 3), row.count, row.key[:110]) for row in rows]


def main(given: list[str]) -> int:
    """Measure one side and write it."""
    arguments = parse_arguments(Arguments, given)
    pairs = (pair.split("=", 1) for pair in arguments.settings.split(",") if pair)
    settings = {key: yaml.safe_load(value) for key, value in pairs}
    import torch

    torch.cuda.set_device(0)
    words = (*sized_here(arguments.recipe), f"precision={arguments.precision}", f"backend={arguments.backend}")
    if arguments.side == "stages":
        found = stage_seconds(words, arguments.steps)
    elif arguments.side == "kernels":
        step = work.ours(words, "cuda")
        for _ in range(3):
            step()
        found = longest_kernels(step)
    else:
        share_cudnn()  # the one thing of ours that the others are given: without it their attention may not be fused
        recipe = compose(list(words))
        if arguments.side == "megatron":
            step = megatron(recipe, **settings)
        else:
            step = work.transformers(words, device="cuda", dtype="bfloat16", **settings)
        found = {"step_seconds": step_seconds(step, arguments.steps), **step.facts}
        found["memory_peak_bytes"] = torch.cuda.max_memory_allocated()
    arguments.output.write_text(json.dumps(found) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
