"""Validate, time and draw one pipeline schedule; no GPU, no torch.

    python launcher/schedule.py name=dualpipe pipeline=8 microbatches=20
    python launcher/schedule.py name=zb1p pipeline=8 microbatches=20 format=svg output=zb1p.svg

Before anything is shown the schedule is proven: every forward, input and weight gradient exactly once on the right
rank, in an order that cannot hang. Times are in any one unit; a whole backward takes input_grad + weight_grad, and
overlapped (a forward together with a backward) defaults to the sum of both: no gain.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded
from launcher.command_line.output import print_or_write
from parallel.errors import RecipeError
from parallel.pipeline.actions import Schedule
from parallel.pipeline.drawing import draw_svg, draw_text
from parallel.pipeline.simulator import Timeline, Times, simulate
from parallel.pipeline.validate import validate
from parallel.schedules import SCHEDULES, make_schedule, placement
from parallel.search import search


class ScheduleArguments(Arguments):
    """Keys of the command."""

    name: str = Field(description=", ".join((*SCHEDULES, "auto")) + " (searched for the times given)")
    pipeline: PositiveInt = Field(description="pipeline ranks P")
    microbatches: PositiveInt = Field(description="microbatches of a step")
    chunks: PositiveInt = Field(1, description="stages of a rank, for interleaved")
    forward: float = Field(1.0, alias="times.forward", description="a stage's forward (times.forward=...)")
    input_grad: float = Field(1.0, alias="times.input_grad", description="its input gradient")
    weight_grad: float = Field(1.0, alias="times.weight_grad", description="its weight gradient")
    overlapped: float | None = Field(None, alias="times.overlapped", description="a forward with a backward")
    send: float = Field(0.0, alias="times.send", description="a message between two ranks")
    cost: str | None = Field(None, alias="times.cost", description="relative cost of each stage, such as 1,1,1,1.4")
    seed: NonNegativeInt = Field(0, description="of the search that name=auto makes")
    format: Literal["text", "json", "svg", "actions"] = Field("text", description="text, json, svg or actions")
    width: PositiveInt | None = Field(None, le=100_000, description="columns of text, pixels of svg; null = what suits")
    output: Path | None = Field(None, description="file to write; null = stdout")


@takes(ScheduleArguments, __doc__)
def main(asked: ScheduleArguments) -> int:
    """Show the schedule; return the exit code."""
    if asked.name == "auto":
        schedule = searched(asked)
    else:
        schedule = make_schedule(asked.name, asked.pipeline, asked.microbatches, asked.chunks)
    validate(schedule)
    timeline = simulate(schedule, times_of(asked, schedule.stages))
    print_or_write(show(timeline, asked.format, asked.width), asked.output)
    return 0


def searched(asked: ScheduleArguments) -> Schedule:
    """Return the best schedule found for the times given; as text, also say what was tried."""
    place = placement(asked.name, asked.pipeline, asked.microbatches, asked.chunks)
    found = search(place, times_of(asked, place.stages), seed=asked.seed)
    if asked.format == "text":
        print("tried: " + ", ".join(f"{what} {makespan:g}" for what, makespan in found.tried))
    return found.schedule


def times_of(asked: ScheduleArguments, stages: int) -> Times:
    """Return the times that were asked for."""
    return Times.of(
        stages,
        forward=asked.forward,
        input_grad=asked.input_grad,
        weight_grad=asked.weight_grad,
        overlapped=asked.overlapped,
        send=asked.send,
        cost=_costs(asked.cost),
    )


def _costs(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.strip("[]").split(",")]
    except ValueError:
        raise RecipeError(f"times.cost = {text} is no list of numbers; write times.cost=1,1,1,1.4") from None


def show(timeline: Timeline, form: str, width: int | None) -> str:
    """Return a timeline in one of the forms of the command."""
    if form == "json":
        return json.dumps(as_json(timeline))
    if form == "svg":
        return draw_svg(timeline, width or 1600)
    if form == "actions":
        return timeline.schedule.text()
    return draw_text(timeline, width or 160)


def as_json(timeline: Timeline) -> dict[str, object]:
    """Return a timeline as plain data."""
    schedule = timeline.schedule
    return {
        "name": schedule.name,
        "pipeline": len(schedule.ranks),
        "microbatches": schedule.microbatches,
        "makespan": timeline.makespan,
        "bubble": list(timeline.bubble),
        "peak_microbatches": list(schedule.peak_microbatches),
        "ranks": [
            [
                {
                    "kind": step.kind,
                    "parts": [[part.kind, part.stage, part.microbatch] for part in step.parts],
                    "start": start,
                    "end": end,
                }
                for step, start, end in zip(steps, timeline.starts[rank], timeline.ends[rank])
            ]
            for rank, steps in enumerate(schedule.ranks)
        ],
    }


if __name__ == "__main__":
    sys.exit(guarded(main))
