"""Is a run that fails at random useful for the predicted share of its time? Kills it once a minute for an hour, to see.

    python -m benchmarks.goodput [seconds=3600] [mean=60] [every_steps=N] [pace=0.3] [seed=1] [output=FILE.json]

First a few lives, killed at known moments, show what steps, saves and restarts take here. With those the model of
dsv3_megatron/planning/goodput says which share of the time will be useful, and how often to save. Then a rank is killed
at random moments, whatever the run does meanwhile: it starts, loads, trains, saves. Useful are the steps that the
newest checkpoint holds at the end, at the undisturbed step's time. The two shares must be within 3 points of each
other, which a few kills are too few for: the moments of six make as much of a difference.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from benchmarks.goodput_lives import WARM, Lives, Times
from dsv3_megatron.planning.goodput.expected import steps_in
from dsv3_megatron.planning.goodput.model import best_intervals, useful_share
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

POINTS = 0.03
_CALM_LIVES, _CALM_STEPS, _CALM_EVERY = 6, 24, 8


class Arguments(BaseModel):
    """What the command takes."""

    seconds: PositiveFloat = Field(3600.0, description="how long ranks are killed")
    mean: PositiveFloat = Field(60.0, description="seconds between two kills, on average")
    every_steps: PositiveInt | None = Field(None, description="steps between saves; null = the model's best")
    pace: PositiveFloat = Field(0.3, description="seconds that a step takes at least: it sleeps for the rest")
    seed: PositiveInt = Field(1, description="of the moments and of the ranks that are killed")
    output: Path | None = Field(None, description="file to write the figures to")


def calm(place: Path, given: Arguments) -> Times:
    """Return what steps, saves and restarts take where each life is left alone for a while."""
    lives = Lives(place / "calm", _CALM_EVERY, given.pace, given.seed)
    lives.begin()
    for _ in range(_CALM_LIVES):
        lives.live(lambda life: len(life.beats) > WARM + _CALM_STEPS)
    return lives.times()


def disturbed(place: Path, given: Arguments, every_steps: int) -> Lives:
    """Return the lives of a run that is killed at random moments, until the time is up."""
    lives, choice = Lives(place / "hurt", every_steps, given.pace, given.seed), random.Random(given.seed)
    lives.begin()
    begin = due = lives.ended

    def at(moment: float) -> bool:
        return time.monotonic() >= moment

    while lives.ended - begin < given.seconds:
        due += choice.expovariate(1 / given.mean)
        lives.live(lambda life, due=due: at(due))
        due = lives.ended  # a kill that was due while nothing was alive has come at the first moment that could be
        print(f"{len(lives.lives)} kills in {lives.ended - begin:.0f} s, step {lives.kept_steps} saved", flush=True)
    return lives


def compared(given: Arguments, before: Times, lives: Lives) -> dict[str, Any]:
    """Return predicted and measured shares, and what they are made of."""
    first, rate = lives.lives[0], len(lives.lives) / (lives.ended - lives.lives[0].killed)
    measured = lives.kept_steps * before.step_seconds / (lives.ended - first.killed)
    during = lives.times()
    return {
        "kills": len(lives.lives),
        "seconds": lives.ended - first.killed,
        "mean_seconds_between_kills": 1 / rate,
        "every_steps": lives.every_steps,
        "measured_share": measured,
        "predicted_share": share_of(before, 1 / given.mean, lives.every_steps),
        "predicted_share_at_the_rate_that_came": share_of(before, rate, lives.every_steps),
        "predicted_share_by_times_of_the_disturbed_run": share_of(during, rate, lives.every_steps)
        * before.step_seconds
        / during.step_seconds,
        "undisturbed": asdict(before),
        "disturbed": asdict(during),
        "median_steps_of_a_life": median(len(life.beats) for life in lives.lives),
        "load_average": os.getloadavg()[1],
    }


def share_of(times: Times, rate: float, every_steps: int) -> float:
    """Return the useful share that the model predicts."""
    return useful_share(rate, [times.save], [every_steps * times.step_seconds])


def main(arguments: list[str]) -> int:
    """Print both shares; return 0 where they are near enough."""
    given = parse_arguments(Arguments, arguments)
    with tempfile.TemporaryDirectory() as folder:
        before = calm(Path(folder), given)
        print(json.dumps(asdict(before), indent=1), flush=True)
        [best] = best_intervals(1 / given.mean, [before.save])
        every = given.every_steps or steps_in(best, before.step_seconds)
        print(f"a save every {every} steps; the best interval is {best:.1f} s", flush=True)
        found = compared(given, before, disturbed(Path(folder), given, every))
    print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    apart = found["measured_share"] - found["predicted_share"]
    print(
        f"useful: {found['measured_share']:.1%} measured, {found['predicted_share']:.1%} predicted, {100 * apart:+.1f} "
        f"points; {POINTS:.0%} allowed"
    )
    return 0 if abs(apart) <= POINTS else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
