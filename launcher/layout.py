"""Show who holds what on any number of ranks, without starting one: python launcher/layout.py recipe=R world=N [rank=K]

Prints degrees, the stages, and the members of every group of one rank. Other keys are overrides of the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field, NonNegativeInt, PositiveInt

from launcher.command_line.arguments import Arguments, takes_recipe
from launcher.command_line.compose import compose
from launcher.command_line.console import guarded
from parallel.layout import GROUPS, MOST_RANKS, Layout


class LayoutArguments(Arguments):
    """Keys of the command."""

    world: PositiveInt | None = Field(
        None, le=MOST_RANKS, description="ranks; null = those of the recipe's cluster, else 1"
    )
    rank: NonNegativeInt = Field(0, description="the rank whose groups are shown")


@takes_recipe(LayoutArguments, __doc__)
def main(given: LayoutArguments, overrides: list[str]) -> int:
    """Print the layout; return the exit code."""
    recipe = compose(overrides)
    print(describe(recipe.layout(given.world or recipe.cluster.world_size or 1), given.rank))
    return 0


def describe(layout: Layout, rank: int) -> str:
    """Return degrees, coordinates of a rank and the members of its groups, as text."""
    coordinates = layout.coordinates(rank)
    lines = [f"{layout.world_size} ranks: {layout.describe()}"]
    lines.append(f"rank {rank}: " + ", ".join(f"{axis} {place}" for axis, place in coordinates.items()))
    for name in GROUPS:
        groups = layout.groups(name)
        members = next(group for group in groups if rank in group)
        lines.append(f"  {name:<10} {len(groups):5} groups of {len(members):4}   {shorten(members)}")
    return "\n".join(lines)


def shorten(members: Sequence[int]) -> str:
    """Return ranks as text: all of a few, else the first two and the last."""
    if len(members) <= 8:
        return " ".join(map(str, members))
    return f"{members[0]} {members[1]} ... {members[-1]}"


if __name__ == "__main__":
    sys.exit(guarded(main))
