"""The values of a recipe one by one, each with the key that people write for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings and lists, in their order: ``cluster.slurm.options[0]``.

    ``key``: where the content stands.
    """
    if isinstance(content, dict):
        for name, value in content.items():
            yield from leaves(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from leaves(value, f"{key}[{index}]")
    else:
        yield key, content
