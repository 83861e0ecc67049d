"""A run's memory, where its recipe asks for one: the folders of all hosts, who keeps whose copy, and the saver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_megatron.checkpoint.memory.folder import MemoryFolder
from dsv3_megatron.checkpoint.memory.leftovers import Left, clear_leftovers, describe_leftovers
from dsv3_megatron.checkpoint.memory.lives import read_lives
from dsv3_megatron.checkpoint.memory.places import Places, find_places
from dsv3_megatron.checkpoint.memory.saver import MemorySaver
from dsv3_megatron.checkpoint.save import Tell
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.run.directory import RunDirectory
from parallel.agree import agreed, from_first, gathered


def open_memory(
    parts: Parts, directory: RunDirectory, recipe: str, tell: Tell, note: Callable[[str], None], text: dict[str, Any]
) -> MemorySaver | None:
    """Return what keeps states of the run in memory; None where the recipe does not ask for it. All ranks together.

    Args:
        recipe: the resolved recipe.
        tell: gets the events of saves, on rank 0.
        note: gets what a person should know, on rank 0.
        text: tokenizer and data, as manifests describe them.
    Raises: CheckpointError, RecipeError: the run directory's ``memory.json`` is damaged, the folder cannot be made.
    RankFault: it cannot be made on some hosts.
    """
    settings = parts.recipe.checkpoint
    if not settings.memory_every_steps:
        return None
    lives = from_first(lambda: read_lives(directory.memory))
    places = find_places(parts.recipe.cluster.racks)
    folder = MemoryFolder(Path(settings.memory_path), lives.run, places.host)
    left: list[Left] = []
    with agreed(looked=places.is_leader):
        if places.is_leader:
            folder.create(directory.path)
            left = clear_leftovers(folder.root, lives.run)
    for line in describe_leftovers(each for found in gathered(left) for each in found):
        note(line)
    if dist.get_rank() == 0 and (shortcoming := _shortcoming(places, parts.recipe.cluster.racks)):
        note(shortcoming)
    return MemorySaver(folder, places, lives, directory.memory, parts, recipe, tell, text)


def _shortcoming(places: Places, racks: tuple[str, ...]) -> str | None:
    """Return what a person should know of where the copies are."""
    if not places.apart:
        nodes = len(set(places.hosts))
        why = "all ranks are on one node" if nodes == 1 else "one node has more than half of all ranks"
        return f"states in memory have no copy on another node: {why}; they outlive a process, not its node"
    if racks and places.apart != "racks":
        return "one rack has more than half of all ranks: states in memory have their copies on other nodes, some in it"
    return None
