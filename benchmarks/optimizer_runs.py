"""The trainings that benchmarks/muon_vs_adamw.py compares: a recipe's text, order, tokens and shape of the learning
rate; an optimizer, a peak rate and a seed each."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose
from parallel.errors import RecipeError, UserError

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = ("adamw", "muon")
EVALUATIONS = 8  # on held-out text in a run, the last after its last step
MOST_RATES = 7  # of one optimizer: a sweep that still has its best at the edge then is refused


@dataclass(frozen=True)
class Training:
    """One training: ``rate`` is the peak of the recipe's learning-rate curve."""

    optimizer: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Trainings:
    """What all trainings of a comparison share.

    Attributes:
        words: the recipe and its overrides, as on a command line.
        share: of the recipe's tokens; its learning-rate curve is shortened alike.
        directory: where the runs' folders are. A run that is finished there is not run again, one that was cut resumes.
    """

    words: tuple[str, ...]
    share: float
    directory: Path

    def result(self, training: Training) -> dict[str, Any]:
        """Train, unless that was done, and return what became of it.

        ``held_out``: [step, tokens, nats a token] of every evaluation. Raises: CalledProcessError: the run failed.
        UserError: it was stopped by a signal.
        """
        words = self.words_of(training)
        folder = self.directory / f"{training.optimizer}_{training.rate:g}_{training.seed}_{_digest(words)}"
        if not _finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder.parent / f"{folder.name}.log").open("a") as log:
                subprocess.run(
                    [sys.executable, "launcher/pretrain.py", *words, f"run.directory={folder}"],
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        if not _finished(folder):
            raise UserError(f"{folder} was stopped before its end; repeat the command, and it resumes")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        tokens = {0: 0, **{line["step"]: line["tokens"] for line in lines}}
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        held_out = {e["step"]: e["held_out_loss"] for e in events if e["event"] == "held_out"}
        after = json.loads((folder / "summary.json").read_text())["after"]
        return {
            "optimizer": training.optimizer,
            "rate": training.rate,
            "seed": training.seed,
            "steps": lines[-1]["step"],
            "tokens": lines[-1]["tokens"],
            "skipped_steps": sum(bool(line.get("skipped")) for line in lines),
            "held_out_loss": after["held_out_loss"],
            "bits_per_byte": after.get("bits_per_byte"),
            "held_out": [[step, tokens[step], loss] for step, loss in sorted(held_out.items())],
        }

    def words_of(self, training: Training) -> tuple[str, ...]:
        """Return the words of a training's command, but for its directory."""
        recipe = compose(list(self.words))
        unit = "tokens" if recipe.run.tokens else "steps"
        length = f"run.{unit}={round(getattr(recipe.run, unit) * self.share)}"
        every = max(1, round(steps_of(recipe) * self.share / EVALUATIONS))
        return (
            *self.words,
            f"optim.name={training.optimizer}",
            f"optim.learning_rate={curve(recipe, training.rate, self.share)}",
            f"run.seed={training.seed}",
            length,
            f"run.evaluate_every_steps={every}",
            f"checkpoint.every_steps={2 * every}",
            "checkpoint.keep=1",
            "logging.wandb=disabled",
            "logging.console_every_steps=20",
        )


def peak(recipe: Recipe) -> float:
    """Return the largest learning rate of a recipe."""
    rate = recipe.optim.learning_rate
    return rate if isinstance(rate, float) else max(value for p in rate for value in (p.to, p.at) if value is not None)


def curve(recipe: Recipe, rate: float, share: float) -> str:
    """Return a recipe's learning-rate curve with the peak ``rate``, over ``share`` of steps and tokens, as a word."""
    now = recipe.optim.learning_rate
    if isinstance(now, float):
        return repr(rate)
    factor = rate / peak(recipe)
    phases = []
    for phase in now:
        end = max(1, round(phase.end * share))
        values = {name: f"{v * factor:.6g}" for name in ("to", "at") if (v := getattr(phase, name)) is not None}
        fields = {"until": f"{end} steps" if phase.in_steps else str(end), "shape": phase.shape, **values}
        phases.append("{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}")
    return "[" + ", ".join(phases) + "]"


def steps_of(recipe: Recipe) -> int:
    """Return the optimizer steps of a whole recipe, nearly where its batch changes."""
    if not recipe.run.tokens:
        return recipe.run.steps
    batch = recipe.optim.global_batch
    sequences = batch if isinstance(batch, int) else max(p.to or p.at or 1 for p in batch)
    return max(1, round(recipe.run.tokens / (sequences * recipe.data.sequence_length)))


def sweep(loss: Callable[[float], float], rates: Sequence[float]) -> dict[float, float]:
    """Return the loss at every rate, with more rates, each a factor of two further, until the best is not at an edge.

    Raises RecipeError: it still is with ``MOST_RATES``.
    """
    found = {rate: loss(rate) for rate in sorted(rates)}
    while (best := min(found, key=found.__getitem__)) in (min(found), max(found)):
        if len(found) >= MOST_RATES:
            raise RecipeError(f"rates: the best of {len(found)} is still at an edge, {best:g}; begin with others")
        further = best * 2 if best == max(found) else best / 2
        found[further] = loss(further)
    return dict(sorted(found.items()))


def _digest(words: Sequence[str]) -> str:
    """Return a short name of a recipe: another recipe, or a file of it that has changed, is another run."""
    recipe = compose([*words, "run.directory=runs/digest"])
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:8]


def _finished(folder: Path) -> bool:
    """Whether a run has come to its end; one that a signal has stopped leaves a summary without a last evaluation."""
    summary = folder / "summary.json"
    return summary.exists() and bool(json.loads(summary.read_text()).get("after"))
