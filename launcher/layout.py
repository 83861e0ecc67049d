"""Show who holds what on any number of ranks, without starting one: python launcher/layout.py recipe=R world=N [rank=K]

world defaults to the recipe's cluster. Prints degrees, the stages, and the members of every group of one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from launcher.compose import compose
from launcher.console import guarded
from parallel.errors import LayoutError
from parallel.layout import GROUPS, Layout


def main(arguments: Sequence[str]) -> int:
    """Print the layout; return the exit code."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    own = {"world": None, "rank": 0}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in own:
            overrides.append(argument)
        elif not value.isdecimal():
            raise LayoutError(f"{key} = {value} is not a number of ranks; write {key}=N")
        else:
            own[key] = int(value)
    recipe = compose(overrides)
    world = own["world"] or recipe.cluster.world_size or 1
    layout = recipe.layout(world)
    print(describe(layout, own["rank"]))
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
