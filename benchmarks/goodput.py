"""Is a run that fails at random useful for the predicted share of its time? Kills it once a minute for an hour, to see.

    python -m benchmarks.goodput [seconds=3600] [mean=60] [rounds=12] [every_steps=N] [pace=1] [seed=1] [output=FILE]

A few lives, killed at known moments, show what steps, saves and restarts take here. With those the model of
dsv3_megatron/planning/goodput says which share of the time will be useful, and how often to save. Then a rank is killed
at random moments, whatever the run does meanwhile: it starts, loads, trains, saves. Useful are the steps that the
newest checkpoint holds at the end, at the undisturbed step's time. The two shares must be within 3 points of each
other. That takes an hour, as the moments of a few kills make as much of a difference, and a machine without other work:
calm and disturbed lives take turns, but work that slows only one kind shows as a difference, and is reported.
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
_DRIFT = 0.02  # of a step's time, and ten times that of a start's: above it a difference says little
_CALM_LIVES, _CALM_STEPS, _CALM_EVERY = 4, 10, 4


class Arguments(BaseModel):
    """What the command takes."""

    seconds: PositiveFloat = Field(3600.0, description="how long ranks are killed")
    mean: PositiveFloat = Field(60.0, description="seconds between two kills, on average")
    rounds: PositiveInt = Field(12, description="how often calm and disturbed lives take turns")
    every_steps: PositiveInt | None = Field(None, description="steps between saves; null = the model's best")
    pace: PositiveFloat = Field(1.0, description="seconds that a step takes at least: it sleeps for the rest")
    seed: PositiveInt = Field(1, description="of the moments and of the ranks that are killed")
    output: Path | None = Field(None, description="file to write the figures to")


def leave_alone(calm: Lives) -> None:
    """Live a few lives, each for as many steps."""
    calm.begin_round()
    for _ in range(_CALM_LIVES):
        calm.live(lambda life: len(life.beats) > WARM + _CALM_STEPS)


def disturb(hurt: Lives, choice: random.Random, seconds: float, mean: float) -> None:
    """Kill at random moments until the time is up."""
    hurt.begin_round()
    begin = killed = time.monotonic()
    while killed - begin < seconds:
        due = killed + choice.expovariate(1 / mean)
        hurt.live(lambda life, due=due: time.monotonic() >= due)
        killed = hurt.lives[-1].killed
    print(f"{len(hurt.lives)} kills in {hurt.seconds:.0f} s, step {hurt.kept_steps} saved", flush=True)


def compared(given: Arguments, calm: Times, hurt: Lives) -> dict[str, Any]:
    """Return predicted and measured shares, and what they are made of."""
    rate, during = len(hurt.lives) / hurt.seconds, hurt.times()
    by_itself = share_of(during, rate, hurt.every_steps) * calm.step_seconds / during.step_seconds
    return {
        "kills": len(hurt.lives),
        "seconds": hurt.seconds,
        "every_steps": hurt.every_steps,
        "measured_share": hurt.kept_steps * calm.step_seconds / hurt.seconds,
        "predicted_share": share_of(calm, 1 / given.mean, hurt.every_steps),
        "mean_seconds_between_kills": 1 / rate,
        "predicted_share_at_the_rate_that_came": share_of(calm, rate, hurt.every_steps),
        "predicted_share_by_times_of_the_disturbed_run": by_itself,
        "undisturbed": asdict(calm),
        "disturbed": asdict(during),
        "median_steps_of_a_life": median(len(life.beats) for life in hurt.lives),
        "load_average": os.getloadavg()[1],
    }


def share_of(times: Times, rate: float, every_steps: int) -> float:
    """Return the useful share that the model predicts."""
    return useful_share(rate, [times.save], [every_steps * times.step_seconds])


def main(arguments: list[str]) -> int:
    """Print both shares; return 0 where they are near enough."""
    given = parse_arguments(Arguments, arguments)
    choice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm = Lives(Path(folder) / "calm", _CALM_EVERY, given.pace, given.seed)
        leave_alone(calm)
        before = calm.times()
        print(json.dumps(asdict(before), indent=1), flush=True)
        [best] = best_intervals(1 / given.mean, [before.save])
        every = given.every_steps or steps_in(best, before.step_seconds)
        print(f"a save every {every} steps; the best interval is {best:.1f} s", flush=True)
        hurt = Lives(Path(folder) / "hurt", every, given.pace, given.seed)
        for number in range(given.rounds):
            if number:
                leave_alone(calm)
            disturb(hurt, choice, given.seconds / given.rounds, given.mean)
        found = compared(given, calm.times(), hurt)
    print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    apart = found["measured_share"] - found["predicted_share"]
    print(
        f"useful: {found['measured_share']:.1%} measured, {found['predicted_share']:.1%} predicted, {100 * apart:+.1f} "
        f"points; {POINTS:.0%} allowed"
    )
    if drift := drift_of(found):
        print(drift)
    return 0 if abs(apart) <= POINTS else 1


def drift_of(found: dict[str, Any]) -> str | None:
    """Return what to say where disturbed lives were slower or faster than calm ones, else None."""
    names = ("step_seconds", "recovery_seconds")
    ratios = {name: found["disturbed"][name] / found["undisturbed"][name] for name in names}
    if abs(ratios["step_seconds"] - 1) < _DRIFT and abs(ratios["recovery_seconds"] - 1) < 10 * _DRIFT:
        return None
    return (
        f"warning: other work on the machine: steps of the killed run took {ratios['step_seconds']:.0%} of the "
        f"undisturbed time, starts {ratios['recovery_seconds']:.0%}; with its own times the model says "
        f"{found['predicted_share_by_times_of_the_disturbed_run']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
