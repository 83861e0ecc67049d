"""Which rows of a run's files can be shown: one may be damaged, or of somebody else. What is not sound is counted."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

BY_LAYER = ("max_attention_logit",)  # of what is drawn
_LARGEST = 1e30  # beyond what is measured, and far below what a chart's arithmetic overflows at
_NAME_LENGTH = 100  # of an event, a source, a task
_VALUES, _VALUE_LENGTH = 40, 200  # that are shown of an event
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 4, 20, 20, 200, 200


def sound_step(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the places and the metrics ``keys`` of a step; None where one of them is no number.

    A metric is a number, or null where it was not measured; one of ``BY_LAYER`` may be a list of them.
    """
    kept = {key: row.get(key) for key in keys}
    if not (_is_whole(row.get("step")) and _is_whole(row.get("tokens")) and is_number(row.get("step_seconds"))):
        return None
    if row["step_seconds"] < 0 or not all(_is_metric(*item) for item in kept.items()):
        return None
    return {**kept, "step": row["step"], "tokens": row["tokens"], "step_seconds": row["step_seconds"]}


def sound_event(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return an event as it came; None where it has no name, no time, or measured what is no number."""
    name, step = row.get("event"), row.get("step")
    if not _is_name(name) or not _is_time(row.get("time")) or not (step is None or _is_whole(step)):
        return None
    if name == "held_out":
        measured = [row.get("held_out_loss"), *(row[key] for key in row if key.startswith("held_out/"))]
        named = all(_is_name(key) for key in row if key.startswith("held_out/"))
    elif name == "task":
        measured, named = [row.get("acc")], _is_name(row.get("task"))
    else:
        return row
    return row if named and step is not None and all(v is None or is_number(v) for v in measured) else None


def shown_event(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event with its values as short texts: two hundred of them lie in memory."""
    values = {k: v for k, v in event.items() if k not in ("event", "time", "step") and v is not None}
    shown = {k[:_NAME_LENGTH]: short(v) for k, v in list(values.items())[:_VALUES]}
    place = {"step": event["step"]} if event.get("step") is not None else {}
    return {"event": event["event"], "time": event["time"], **place, "values": shown}


def short(value: object) -> str:
    """Return a value as a text that a table has room for."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) else _SHORT.repr(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 3] + "..."


def sound_loads(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the newest loads of all experts, step and [layers, experts]; None where they are none."""
    if row is None or not _is_whole(row.get("step")):
        return None
    loads = row.get("loads")
    if not isinstance(loads, list) or not all(isinstance(one, list) and one for one in loads):
        return None
    if sum(map(len, loads)) > 1 << 20 or not all(is_number(n) and n >= 0 for one in loads for n in one):
        return None
    return {"step": row["step"], "loads": loads}


# What draw_svg of parallel/pipeline/drawing.py writes, and nothing that could load, run or style anything.
_VALUE = r"[\w .,#%:;+-]*"
_ATTRIBUTE = (
    r' (?:xmlns="http://www\.w3\.org/2000/svg"|fill="url\(#hatch\)"|patternTransform="rotate\(45\)"|id="hatch"'
    rf"|(?:width|height|viewBox|font-family|font-size|patternUnits|x|y|fill|stroke|stroke-width|text-anchor"
    rf'|text-decoration|pointer-events)="{_VALUE}")'
)
_DRAWN = re.compile(
    rf"<(?:svg|defs|pattern|rect|text|title)(?:{_ATTRIBUTE})*/?>|</(?:svg|defs|pattern|rect|text|title)>"
    r"|[^<>&]+|&(?:amp|lt|gt|quot|#x27);"
)


def is_drawing(text: str) -> bool:
    """Return whether a text is a schedule that this program has drawn, or could have: it becomes part of the page."""
    place = 0
    while place < len(text):
        if (found := _DRAWN.match(text, place)) is None:
            return False
        place = found.end()
    return text.startswith("<svg ") and text.rstrip().endswith("</svg>")


def is_number(value: object) -> bool:
    """Return whether a value is a number that can be drawn."""
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST  # type: ignore[operator]


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_metric(key: str, value: object) -> bool:
    if isinstance(value, list):
        return key in BY_LAYER and len(value) <= 1 << 14 and all(each is None or is_number(each) for each in value)
    return value is None or is_number(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _NAME_LENGTH


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 40:
        return False
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False
