"""The ``evaluate`` section of a recipe."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from parallel.errors import RecipeError


class EvaluateSettings(BaseModel):
    """Tasks that a run is measured by while it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...] = Field((), description="files of multiple-choice tasks, JSON lines (docs/evaluation.md)")
    every_steps: NonNegativeInt = Field(0, description="accuracy in tasks every so many steps; 0 = at the end alone")
    examples: PositiveInt | None = Field(None, description="of each task, the first so many; null = all")

    def check(self) -> None:
        """Raise RecipeError for keys that would have no effect, and for two tasks of one name."""
        if not self.tasks:
            for key in ("every_steps", "examples"):
                if value := getattr(self, key):
                    raise RecipeError(
                        f"evaluate.{key} = {value}, but evaluate.tasks names no file; name one, or leave it out"
                    )
        names: dict[str, str] = {}
        for path in self.tasks:
            other = names.setdefault(Path(path).stem, path)
            if other != path or self.tasks.count(path) > 1:
                raise RecipeError(
                    f"evaluate.tasks names {other} and {path}: both are called {Path(path).stem}; rename one of them"
                )
