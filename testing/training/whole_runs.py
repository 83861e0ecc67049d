"""Whole runs through the trainer, on fresh processes: what tests of resuming, data and precision start and read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dsv3_megatron.train.run import run
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.errors import UserError
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe

FOUR_STEPS = ("run.steps=4", "checkpoint.every_steps=2", "checkpoint.keep=9", "optim.learning_rate=0.01")
_REFUSED = "refused: "


class Notes(SilentReporter):
    """Keeps what the run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note."""
        self.texts.append(text)


def run_here(overrides: list[str]) -> list[str]:
    """Train on this rank; return the notes, or "refused: " and the message of what a user can fix."""
    torch.set_num_threads(1)
    recipe, notes = small_recipe(*overrides), Notes()
    try:
        run(recipe, World.from_environment(), notes, resolved_yaml(recipe))
    except UserError as error:
        return [f"{_REFUSED}{error}"]
    return notes.texts


def train(world: int, *overrides: str) -> list[str]:
    """Run on ``world`` fresh processes; return rank 0's notes."""
    return run_ranks(world, run_here, [list(overrides)])[0][0]


def refusal(notes: list[str]) -> str | None:
    """Return the message of a run that was refused, None where it went through."""
    return next((note.removeprefix(_REFUSED) for note in notes if note.startswith(_REFUSED)), None)


def steps(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's events.jsonl, all or those of one name."""
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if name is None or line["event"] == name]


def copy_of(directory: Path, place: Path, keep_steps: int) -> Path:
    """Copy a run as it was after some steps to ``place``; return that."""
    shutil.copytree(directory, place)
    for checkpoint in (place / "checkpoints").glob("step_*"):
        if int(checkpoint.name.split("_")[1]) > keep_steps:
            shutil.rmtree(checkpoint)
    return place
