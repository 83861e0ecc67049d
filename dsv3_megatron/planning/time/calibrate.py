"""Stage times measured on a real GPU, in place of the roofline's.

The file is JSON: ``{"forward": [seconds of every stage], "input_grad": [...], "weight_grad": [...], "overlapped":
[[seconds of a forward of stage s with a backward of stage t]] or one number, "send": seconds}``; one number in place of
a list stands for every stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.handed import read_json_file
from parallel.errors import RecipeError
from parallel.pipeline.simulator import LONGEST, Times

Second = Annotated[float, Field(gt=0, le=LONGEST)]
Seconds = Second | tuple[Second, ...]


class Measured(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: Seconds
    input_grad: Seconds
    weight_grad: Seconds
    overlapped: Second | tuple[tuple[Second, ...], ...] | None = None
    send: Annotated[float, Field(ge=0, le=LONGEST)] = 0.0

    def times(self, stages: int) -> Times:
        """Return the simulator's times. Raises ValueError: a list has not one number per stage."""

        def spread(name: str) -> tuple[float, ...]:
            value = getattr(self, name)
            value = (value,) * stages if isinstance(value, float) else value
            if len(value) != stages:
                raise ValueError(f"{name} has {len(value)} numbers for {stages} stages")
            return value

        pairs = self.overlapped
        if isinstance(pairs, float):
            pairs = ((pairs,) * stages,) * stages
        elif pairs is not None and {len(pairs), *map(len, pairs)} != {stages}:
            raise ValueError(f"overlapped is not {stages} x {stages}")
        return Times(spread("forward"), spread("input_grad"), spread("weight_grad"), send=self.send, pairs=pairs)


def times_from_file(path: Path, recipe: Recipe) -> Times:
    """Return the times in a file. Raises RecipeError naming it, why, and what it should be."""
    try:
        return Measured.model_validate(read_json_file(path)).times(len(layers_of_stages(recipe)))
    except OSError as error:
        raise RecipeError(
            f"calibrate = {path} cannot be read ({error.strerror}); name a file of measured times"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("tuple", "float", "constrained"))
        )
        raise RecipeError(f"calibrate = {path}: {key}: {first['msg']}; see docs/planning.md for its keys") from None
    except ValueError as error:
        raise RecipeError(f"calibrate = {path}: {error}; see docs/planning.md for its keys") from None
