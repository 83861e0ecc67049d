"""The table of pipeline schedules, and the one function that makes any of them.

A schedule is a generator of a page: ``name(ranks, microbatches)`` -> Schedule. To add one, write the page, add a line
to SCHEDULES, and the validator, simulator, drawing and engine take it as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Placement, Schedule
from parallel.schedules.dualpipe import dualpipe
from parallel.schedules.dualpipev import dualpipev
from parallel.schedules.forward_only import forward_only
from parallel.schedules.interleaved import interleaved
from parallel.schedules.one_f_one_b import one_f_one_b
from parallel.schedules.zb1p import zb1p

__all__ = ["MOST_PASSES", "PLACEMENTS", "SCHEDULES", "check_size", "forward_only", "make_schedule", "placement"]

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}

MOST_PASSES = 1_000_000  # stages times microbatches; a large run has ten thousand

PLACEMENTS: dict[str, Literal["loop", "v", "mirror"]] = {
    "1f1b": "loop",
    "interleaved": "loop",
    "zb1p": "loop",
    "dualpipe": "mirror",
    "dualpipev": "v",
}


def check_size(ranks: int, microbatches: int, chunks: int) -> None:
    """Raise ScheduleError where a schedule would have more passes than can be listed, proven and drawn."""
    if ranks * microbatches * chunks > MOST_PASSES:
        raise ScheduleError(
            f"pipeline = {ranks}, microbatches = {microbatches}, chunks = {chunks} are more than {MOST_PASSES:,} "
            "passes; lower one of them (microbatches = optim.global_batch / optim.micro_batch / data-parallel ranks)"
        )


def placement(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Placement:
    """Return where stages lie under a schedule, without making it. Raises ScheduleError: it would be too large."""
    check_size(ranks, microbatches, chunks)
    # A searched schedule has DualPipe's placement where that exists: two directions leave the fewest bubbles.
    kind = ("loop" if ranks % 2 else "mirror") if name == "auto" else PLACEMENTS[name]
    return Placement(kind, ranks, 2 * ranks if kind == "v" else ranks * chunks, microbatches)


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Return a schedule by its name.

    Args:
        name: a key of SCHEDULES.
        ranks: pipeline-parallel ranks P.
        microbatches: of one step of one pipeline.
        chunks: stages a rank holds, for ``interleaved``.
    Raises: ScheduleError: no such schedule, or it cannot be made of these numbers.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ScheduleError(f"name = {name} is no schedule; {hint}there are: {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1 or chunks < 1:
        raise ScheduleError(
            f"pipeline = {ranks}, microbatches = {microbatches}, chunks = {chunks}: use 1 or more of each"
        )
    check_size(ranks, microbatches, chunks)
    if name == "interleaved":
        return interleaved(ranks, microbatches, chunks)
    if chunks != 1:
        raise ScheduleError(f"chunks = {chunks} belongs to name=interleaved, but name = {name}; set chunks=1")
    return SCHEDULES[name](ranks, microbatches)
