"""How the recipe of a resumed run differs from the one its checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_megatron.run.recipe_text.stored import read_stored_recipe
from parallel.errors import CheckpointError

# Where and how a run is started and watched: no number that is trained depends on it.
NOT_TOLD = ("recipe", "run.name", "run.directory", "run.resume", "cluster", "logging", "checkpoint.load")
FIXED = "model"  # the shape of the tensors that were saved
NOT_FIXED = ("model.freeze",)  # whose moments are kept: what a checkpoint lacks begins anew (load.py)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a stored recipe as plain values. Raises CheckpointError: it cannot be read, or lacks a section without
    which nobody can tell whether a run may resume with another one."""
    try:
        recipe = read_stored_recipe(path)
        if lacking := [name for name in (FIXED, "optim", "data") if not isinstance(recipe.get(name), dict)]:
            raise ValueError(f"{path} has no section {lacking[0]}")
        return recipe
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore it") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; restore it") from None


def changes(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key -> (value stored, value now) for every key both have that differs, lists and phases whole.

    A section that one of the two has switched off (null) differs as a whole.
    """
    return {key: pair for key, pair in _differences(stored, now, "") if not _within(key, NOT_TOLD)}


def refusal(found: dict[str, tuple[Any, Any]]) -> str | None:
    """Return the first change that a checkpoint cannot follow, as "key = old, not new"; None if there is none."""
    for key, (old, new) in found.items():
        if _within(key, (FIXED,)) and not _within(key, NOT_FIXED):
            return f"{key} = {show(old)}, not {show(new)}"
    return None


def show(value: Any) -> str:
    """Return a value as a recipe would hold it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in old:
        if name not in new:
            continue
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            yield from _differences(old[name], new[name], f"{prefix}{name}.")
        elif old[name] != new[name]:
            yield prefix + name, (old[name], new[name])
