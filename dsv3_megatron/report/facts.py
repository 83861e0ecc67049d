"""What the files of a run directory say, read without torch. Everything in the report comes from here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import read_json, read_json_lines


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells it."""

    recipe: Recipe
    recipe_text: str
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    loads: dict[str, Any] | None
    environment: dict[str, Any]
    schedule_svg: str | None
    finished: bool

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest step."""
        return self.steps[-1] if self.steps else None

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return a metric by tokens consumed."""
        return [(s["tokens"], s[key]) for s in self.steps if s.get(key) is not None]

    def held_out(self) -> list[tuple[float, float]]:
        """Return the held-out losses by tokens consumed."""
        tokens = {s["step"]: s["tokens"] for s in self.steps}
        points = {e["step"]: e["held_out_loss"] for e in self.events if e["event"] == "held_out"}
        return [
            (float(tokens.get(step, 0)), loss) for step, loss in sorted(points.items()) if step in tokens or not step
        ]

    @cached_property
    def regime(self) -> Regime:
        """What changes over the run."""
        return Regime(self.recipe.optim, self.recipe.data.sequence_length)

    @cached_property
    def budget_tokens(self) -> int:
        """Tokens of the whole run."""
        run = self.recipe.run
        by_steps = self.regime.tokens_of_step(run.steps) if run.steps is not None else None
        return min(t for t in (by_steps, run.tokens) if t is not None)

    @cached_property
    def effective_time(self) -> float | None:
        """Return seconds of steps that counted over seconds since the first start; None before there is one."""
        starts = [e for e in self.events if e["event"] == "started"]
        if not starts or not self.steps:
            return None
        times = [datetime.fromisoformat(e["time"]) for e in self.events]
        wall = (max(times) - datetime.fromisoformat(starts[0]["time"])).total_seconds()
        useful = sum(s["step_seconds"] for s in self.steps)
        return min(1.0, useful / wall) if wall > useful * 0.5 else None


def read_run(path: Path) -> RunFacts:
    """Return the facts of a run directory. Files that are not there yet leave their part empty.

    Raises: FileNotFoundError: there is no recipe.yaml, so this is no run directory.
    """
    run = RunDirectory(path)
    text = run.recipe.read_text()
    loads = read_json_lines(run.expert_load)
    return RunFacts(
        recipe=Recipe.model_validate(OmegaConf.to_container(OmegaConf.create(text))),
        recipe_text=text,
        steps=read_json_lines(run.metrics),
        events=read_json_lines(run.events),
        loads=loads[-1] if loads else None,
        environment=read_json(path / "environment.json"),
        schedule_svg=run.schedule.read_text() if run.schedule.exists() else None,
        finished=run.finished.exists(),
    )
