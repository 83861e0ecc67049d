"""How the recipe of a resumed run differs from the one its checkpoint was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Where and how a run is started and watched: no number that is trained depends on it.
NOT_TOLD = ("recipe", "run.name", "run.directory", "run.resume", "cluster", "logging", "checkpoint.load")
FIXED = "model"  # the shape of the tensors that were saved


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a stored recipe as plain values."""
    return OmegaConf.to_container(OmegaConf.load(path))


def changes(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return key -> (value stored, value now) for every key both have that differs, lists and phases whole."""
    old, new = _flat(stored), _flat(now)
    both = [key for key in old if key in new and old[key] != new[key]]
    return {key: (old[key], new[key]) for key in both if not _within(key, NOT_TOLD)}


def refusal(found: dict[str, tuple[Any, Any]]) -> str | None:
    """Return the first change that a checkpoint cannot follow, as "key = old, not new"; None if there is none."""
    for key, (old, new) in found.items():
        if _within(key, (FIXED,)):
            return f"{key} = {show(old)}, not {show(new)}"
    return None


def show(value: Any) -> str:
    """Return a value as a recipe would hold it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
