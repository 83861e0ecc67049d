"""True-size layers on this GPU: memory beside the plan, speed beside plain megatron-core, kernels, the host's share."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import work
from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.registry import MEASURED
from benchmarks.gpu_check.sizing import plan_of, sized
from benchmarks.gpu_check.tiny import stepper, words
from benchmarks.gpu_sides import longest_kernels, step_seconds
from benchmarks.gpu_table import in_paper_terms

STEPS = 6
MEMORY_WITHIN = (0.85, 1.05)  # of what the plan counts: the search packs GPUs by it
LAUNCHES_OF = 3  # steps that the host's time is taken over


def recipe_of(visit: Visit, *more: str) -> tuple[str, ...]:
    """Return the measuring recipe for the GPU that was found."""
    machine = visit.found["machine"]
    return (*sized(machine["memory_bytes"], gpu=machine["name"]), *more)


def plan(visit: Visit) -> Outcomes:
    """What the planner counts for each of our rows, by the real modules on fake tensors: a process without a GPU."""
    from launcher.command_line.compose import compose

    found = {}
    for backend, precision in MEASURED:
        recipe = compose(list(recipe_of(visit, f"backend={backend}", f"precision={precision}")))
        rank = plan_of(recipe, exact=True).tightest
        found[f"{backend} {precision}"] = _counted(rank)
    said = "; ".join(f"{name} {one['planned'] / 2**30:.2f} GiB" for name, one in found.items())
    yield judged(True, f"{' '.join(recipe_of(visit))}: {said}", **found)


def _counted(rank: Any) -> dict[str, int]:
    """Return bytes of a rank as an allocator sees them: without the context, and without and with fragmentation."""
    planned = rank.total_bytes - rank.reserved_bytes - rank.fragmentation_bytes
    return {"planned": planned, "allowed": planned + rank.fragmentation_bytes}


def ours(visit: Visit, backend: str, precision: str) -> Outcomes:
    """Our trainer's step: its memory, then its time, then its kernels."""
    import torch

    recipe = recipe_of(visit, f"backend={backend}", f"precision={precision}")
    step = work.ours(recipe, visit.device)
    for _ in range(2):  # the second has the optimizer's state in place
        step()
    counted = visit.found.get("plan", {}).get(f"{backend} {precision}")
    yield memory_beside_plan(recipe, counted, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    found = in_paper_terms(recipe, step_seconds(step, STEPS), torch.cuda.max_memory_allocated())
    yield speed(found, visit.found.get(f"speed megatron {precision}"))
    kernels = longest_kernels(step)
    whole = sum(ms for ms, _, _ in kernels)
    shown = "; ".join(f"{ms:.1f} ms in {calls} of {name[:40]}" for ms, calls, name in kernels[:3])
    yield judged(whole > 0, f"{shown}; {len(kernels)} listed", kernels=kernels)


def memory_beside_plan(recipe: tuple[str, ...], counted: dict[str, int] | None, peak: int, reserved: int) -> Outcome:
    """Return whether the peak of what was allocated is what the plan counts (by formulae where ``counted`` is None).

    The context is in neither: no allocator counts it. ``reserved`` less the peak is fragmentation.
    """
    from launcher.command_line.compose import compose

    how = "plan" if counted else "plan by formulae"
    counted = counted or _counted(plan_of(compose(list(recipe))).tightest)
    planned, allowed = counted["planned"], counted["allowed"]
    share, (low, high) = peak / planned, MEMORY_WITHIN
    gib = {"peak": peak / 2**30, "planned": planned / 2**30, "held": reserved / 2**30, "allowed": allowed / 2**30}
    said = (
        f"{gib['peak']:.2f} GiB at its fullest, {how} {gib['planned']:.2f}: {share:.3f} of it (allowed {low} to "
        f"{high}); torch holds {gib['held']:.2f} for it, the plan allows {gib['allowed']:.2f}"
    )
    return judged(low <= share <= high, said, recipe=list(recipe), share=share, **gib)


def speed(found: dict[str, float], plain: dict[str, Any] | None) -> Outcome:
    """Return the speed of a step. It is a figure and no verdict; ``plain`` megatron-core's, where that is known."""
    mfu = f", {found['mfu']:.1%} MFU" if found["mfu"] is not None else ""
    ratio = found["tokens_per_second"] / plain["tokens_per_second"] if plain else None
    beside = f", {ratio:.2f} x plain megatron-core" if ratio else ""
    said = f"{found['tokens_per_second']:.0f} tokens/s, {found['tflops_per_device']:.0f} TFLOP/s{mfu}{beside}"
    return judged(found["tokens_per_second"] > 0, said, **found, beside_megatron=ratio)


def plain(visit: Visit, precision: str) -> Outcomes:
    """The same layers by plain megatron-core over Transformer Engine."""
    import torch

    from benchmarks.plain_megatron import megatron
    from dsv3_megatron.megatron.libraries import share_cudnn
    from launcher.command_line.compose import compose

    share_cudnn()  # nothing else of ours: but with another cuDNN than torch's its attention would not be fused
    recipe = recipe_of(visit, "backend=te", f"precision={precision}")
    step = megatron(compose(list(recipe)), visit.device)
    seconds = step_seconds(step, STEPS)
    yield speed(in_paper_terms(recipe, seconds, torch.cuda.max_memory_allocated()), None)


def host(visit: Visit, backend: str) -> Outcomes:
    """Microseconds of the host for each kernel: a step so small that the GPU waits for the host."""
    import torch

    with stepper(visit, words(backend, "bf16")) as step:
        for _ in range(3):
            step(0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES_OF):
            step(0)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / LAUNCHES_OF
        launches = sum(calls for _, calls, _ in longest_kernels(step, lines=None))
    micro = 1e6 * seconds / max(launches, 1)
    said = f"{micro:.1f} us a kernel: a step of {launches} kernels takes {seconds * 1e3:.1f} ms"
    yield judged(launches > 0, said, microseconds=micro, launches=launches, step_seconds=seconds)
