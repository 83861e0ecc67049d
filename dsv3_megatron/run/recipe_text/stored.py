"""recipe.yaml of a run directory or a checkpoint, as plain values: what every reader of one begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3_megatron.run.recipe_text.interpolations import check_interpolations
from dsv3_megatron.run.recipe_text.yaml_text import read_yaml


def read_stored_recipe(path: Path) -> dict[str, Any]:
    """Return a stored recipe as plain values, in which every reference to another key is that key's value.

    Raises: OSError: it cannot be read, or is no regular file. ValueError: one line: it is no recipe, or refers to what
    may be secret.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no recipe")
    try:
        check_interpolations(content)
        plain = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from None
    assert isinstance(plain, dict)
    return {str(name): section for name, section in plain.items()}
