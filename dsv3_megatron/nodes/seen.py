"""What a node sees: its code, its packages, the data and what else the recipe names by a path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dsv3_megatron.data.source.shards import MANIFEST
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import package_versions
from dsv3_megatron.run.handed import read_bytes
from dsv3_megatron.run.reasons import reason_of

_CODE = ("parallel", "dsv3_megatron", "launcher")


def code_digest(root: Path) -> str:
    """Return a digest of this project's modules under ``root``, and of the versions of what they stand on."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    digest.update(json.dumps(package_versions()).encode())
    return digest.hexdigest()


def data_digest(recipe: Recipe) -> tuple[str | None, str | None]:
    """Return (a digest of the manifest of ``data.path``, None where data is made from a seed; what is wrong)."""
    if recipe.data.source != "indexed" or recipe.data.path is None:
        return None, None
    try:
        return hashlib.sha256(read_bytes(Path(recipe.data.path) / MANIFEST)).hexdigest(), None
    except (OSError, ValueError) as error:
        return None, f"data.path = {recipe.data.path} is not there as shards ({reason_of(error)})"


def missing_paths(recipe: Recipe) -> list[str]:
    """Return a line for each file or folder that the recipe names beside the data, and that this node does not see."""
    named = [
        ("data.tokenizer", recipe.data.tokenizer),
        ("checkpoint.load", recipe.checkpoint.load),
        ("run.start_from", recipe.run.start_from),
        *(("evaluate.tasks", path) for path in recipe.evaluate.tasks),
    ]
    return [f"{key} = {path} is not there" for key, path in named if path and not Path(path).exists()]
