"""Does the watchdog say which rank hangs in which action, while it hangs?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import stepper, words

HANGS_IN = 1  # the microbatch whose forward hangs, of two
TIMEOUT = 1.0  # seconds after which the watchdog speaks
LASTS = 4.0  # seconds of the hang: it must have spoken by then


def is_named(visit: Visit) -> Outcomes:
    """A forward that does not end: on a GPU a kernel that spins, which no host call waits for; on a CPU a call that
    does not return."""
    import torch

    from parallel.pipeline.watchdog import Watchdog, process_group_store

    told: list[str] = []
    with stepper(visit, words("torch", "fp32")) as step:
        step()  # first steps take their time to load kernels
        chunk = next(iter(step.parts.chunks.values()))
        step.parts.watchdog = Watchdog(
            TIMEOUT,
            rank=0,
            world_size=1,
            store=process_group_store(),
            report=told.append,
            device=step.parts.device,
        )
        step.parts._engines.clear()  # engines are made with the watchdog
        handle = chunk.decoder.layers[-1].register_forward_pre_hook(_hanging(_spin_of(visit), HANGS_IN))
        try:
            began = time.perf_counter()
            step()
            took = time.perf_counter() - began
        finally:
            handle.remove()
            step.parts.watchdog.close()
            if not visit.stands_in:
                torch.cuda.synchronize()
    yield verdict(told, took)


def verdict(told: list[str], took: float) -> Outcome:
    """Return whether one report names rank, action and microbatch."""
    if not told:
        return judged(False, f"a step hung for {took:.1f} s, and the watchdog of {TIMEOUT:g} s said nothing", told=told)
    said = " | ".join(line.strip() for line in told[0].splitlines())
    wanted = {
        "rank": r"rank 0: ",
        "action": r"action \d+ of \d+: ",
        "microbatch": rf"rank 0: action [^(]*\(stage 0 microbatch {HANGS_IN}\)",
    }
    if missing := [what for what, pattern in wanted.items() if not re.search(pattern, told[0])]:
        return judged(False, f"the report does not name the {missing[0]}: {said}", told=told)
    return judged(True, said, told=told)


def _hanging(spin: Callable[[], None], microbatch: int) -> Any:
    """Return a hook that hangs when it is called for the microbatch, and only then."""
    calls = []

    def hang(*unused: Any) -> None:
        calls.append(0)
        if len(calls) - 1 == microbatch:
            spin()

    return hang


def _spin_of(visit: Visit) -> Callable[[], None]:
    """Return what hangs for a while; how long a GPU's clock takes is measured now, before anything is watched."""
    if visit.stands_in:
        return lambda: time.sleep(LASTS)
    import torch

    cycles = int(LASTS * _cycles_a_second())
    return lambda: torch.cuda._sleep(cycles)


def _cycles_a_second(cycles: int = 100_000_000) -> float:
    """Return how fast the spinning kernel's clock runs; NVML would say it, but its package may be missing."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    return cycles / (time.perf_counter() - start)
