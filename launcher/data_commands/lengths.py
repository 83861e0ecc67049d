"""Sequence lengths to pack for, as the commands over data take them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.data.prepare.pack import PackAhead
from parallel.errors import RecipeError


def _split(given: object) -> object:
    return [word.strip() for word in given.strip().strip("[]").split(",")] if isinstance(given, str) else given


Lengths = Annotated[tuple[PositiveInt, ...], BeforeValidator(_split)]
FimRate = Annotated[float, Field(ge=0, le=1)]
LENGTH = "tokens of one sequence, as data.sequence_length; several with commas between"
AHEAD = f"pack for these at the end, as launcher/data.py pack does: {LENGTH}; null = a run packs at its start"
FIM_RATE = "of the packing, as data.fim_rate"


def ahead_of(lengths: tuple[int, ...] | None, fim_rate: float) -> PackAhead:
    """Return what to pack for. Raises: RecipeError: a rate is given and no length."""
    if lengths is None and fim_rate:
        raise RecipeError(
            f"fim_rate = {fim_rate:g} has no effect without sequence_length; add that, or leave fim_rate out"
        )
    return PackAhead(tuple(dict.fromkeys(lengths or ())), fim_rate)
