"""What the kernels were asked for since :func:`forget`: what tests read."""

from __future__ import annotations

from typing import Any

_calls: list[tuple[str, dict[str, Any]]] = []


def record(kernel: str, **facts: Any) -> None:
    """Note one call of ``kernel``."""
    _calls.append((kernel, facts))


def calls(kernel: str, **wanted: Any) -> list[dict[str, Any]]:
    """Return the facts of all calls of ``kernel`` that have the facts wanted."""
    return [facts for name, facts in _calls if name == kernel and wanted.items() <= facts.items()]


def forget() -> None:
    """Begin anew."""
    _calls.clear()
