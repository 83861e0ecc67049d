"""What a recipe may refer to: its own keys, and a few variables of the environment that hold no secret.

A recipe is resolved into recipe.yaml, the report and W&B, which others read. OmegaConf's resolvers would put any
variable of the environment there (``${oc.env:WANDB_API_KEY}``), or run whatever a text spells (``${oc.decode:...}``).
"""

from __future__ import annotations

import re
from typing import Any

from dsv3_megatron.run.recipe_text.leaves import leaves

VARIABLES = (
    "HOME", "USER", "LOGNAME", "HOSTNAME", "SCRATCH", "WORK", "PROJECT", "TMPDIR", "SLURM_JOB_ID", "SLURM_JOB_NAME",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR",
)  # fmt: skip
_CHARACTERS = 1 << 20  # that a recipe unfolds to
_DEPTH = 16  # references to values that refer themselves
_SEEN = "\0"  # in the place of what was looked at: what stands around it must not become a name
_Path = tuple[str, ...]
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\\$\{")  # meant as it stands, for a shell say
_KEY = re.compile(r"\$\{[\w\s.\[\]-]*\}")  # of the recipe
_VARIABLE = re.compile(rf"\$\{{\s*oc\.env\s*:\s*(?:{'|'.join(VARIABLES)})\s*(?:,[^${{}}\\\0]*)?\}}")


def check_interpolations(content: Any, key: str = "") -> None:
    """Look through plain values for what they may not refer to. ``key``: where they stand.

    Raises: ValueError: one line that names the first key that does, and what it may; one that refers to itself, or
    unfolds to more than a recipe can hold.
    """
    for place, value in leaves(content, key):
        if isinstance(value, str) and "${" in value and not _is_harmless(value):
            said = " ".join(value.split())[:80]
            raise ValueError(
                f"{place} = {said} would be written to recipe.yaml, report and W&B, where a secret must not be; refer "
                f"to a key (${{run.name}}) or to {', '.join(VARIABLES)} (${{oc.env:HOME}}), or write \\${{ for a "
                "shell's own"
            )
    _Unfolded(content).size(())


def escaped(content: Any) -> Any:
    """Return plain values in which no text refers to anything: OmegaConf reads each as what it is now."""
    if isinstance(content, dict):
        return {name: escaped(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [escaped(value) for value in content]
    if isinstance(content, str) and "${" in content:
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", content)
    return content


def _is_harmless(text: str) -> bool:
    """Return whether a text names keys and known variables alone."""
    return "${" not in _VARIABLE.sub(_SEEN, _KEY.sub(_SEEN, _ESCAPED.sub(r"\1", text)))


class _Unfolded:
    """How many characters the values of a tree come to where each reference is the text of what it refers to."""

    def __init__(self, tree: Any):
        self._tree = tree
        self._sizes: dict[_Path, int | None] = {}  # None: it is being counted

    def size(self, path: _Path, depth: int = 0) -> int:
        """Return the size of what lies at a path. Raises ValueError: it has none, or it is too large."""
        if path not in self._sizes:
            self._sizes[path] = None
            self._sizes[path] = self._count(path, depth)
        if (size := self._sizes[path]) is None or depth > _DEPTH:
            raise ValueError(f"{_dotted(path)} refers to itself, or over more than {_DEPTH} others; write its value")
        return size

    def _count(self, path: _Path, depth: int) -> int:
        content = _at(self._tree, path)
        if isinstance(content, dict | list | tuple):
            keys = content if isinstance(content, dict) else range(len(content))
            size = sum(self.size((*path, str(key)), depth) for key in keys)
        elif isinstance(content, str):
            places = (_place(found[0], path) for found in _KEY.finditer(_ESCAPED.sub(r"\1", content)))
            size = len(content) + sum(self.size(place, depth + 1) for place in places)
        else:
            size = 1
        if size > _CHARACTERS:
            raise ValueError(f"{_dotted(path) or 'it'} refers to more than {_CHARACTERS:,} characters; write less")
        return size


def _place(reference: str, path: _Path) -> _Path:
    """Return where a reference at a path leads: ``${run.name}`` from the top, ``${.name}`` from where it stands."""
    name = reference[2:-1].strip()
    inner = name.lstrip(".")
    up = len(name) - len(inner)
    parts = tuple(part for part in re.split(r"[.\[\]\s]+", inner) if part)
    return (*path[: len(path) - up], *parts) if up else parts


def _at(tree: Any, path: _Path) -> Any:
    """Return what lies at a path: the text on the way where there is one, None where nothing does."""
    for part in path:
        if isinstance(tree, dict):
            tree = next((value for key, value in tree.items() if str(key) == part), None)
        elif isinstance(tree, list | tuple) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return tree if isinstance(tree, str) else None
    return tree


def _dotted(path: _Path) -> str:
    return ".".join(path)[:200]
