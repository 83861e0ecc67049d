"""A timeline as a picture: SVG for documents, text for terminals. Readable without colour.

Forward is white, backward dark, input gradient grey, weight gradient hatched; an overlapped action is split, forward
above backward. A microbatch that entered at the far end of the pipeline (DualPipe) has its number underlined.
"""

from __future__ import annotations

from html import escape

from parallel.pipeline.actions import Action, Schedule, Step
from parallel.pipeline.simulator import Timeline

FILLS = {"F": "#ffffff", "B": "#1f4e79", "I": "#9dc3e6", "W": "url(#hatch)"}
_INK = {"F": "#000000", "B": "#ffffff", "I": "#000000", "W": "#000000"}
_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_ROW, _LEFT, _TOP = 26, 64, 44


def draw_svg(timeline: Timeline, width: int = 1600) -> str:
    """Return the Gantt chart of a timeline as an SVG document: a row per rank, time to the right."""
    schedule, scale = timeline.schedule, (width - _LEFT - 10) / timeline.makespan
    height = _TOP + _ROW * len(schedule.ranks) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" fill="#ffffff"/><rect width="2" height="5" fill="#c0c0c0"/></pattern></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="16" font-size="13">{escape(_title(timeline))}</text>',
        *_legend(),
    ]
    for rank, steps in enumerate(schedule.ranks):
        y = _TOP + _ROW * rank
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 15}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width - _LEFT - 10}" height="{_ROW - 4}" fill="#eeeeee"/>')
        for step, start, end in zip(steps, timeline.starts[rank], timeline.ends[rank]):
            x, wide = _LEFT + start * scale, (end - start) * scale
            high = (_ROW - 4) / len(step.parts)
            for number, part in enumerate(step.parts):
                parts += _box(schedule, part, x, y + number * high, wide, high)
    parts.append(f'<text x="{_LEFT}" y="{height - 8}">0</text>')
    parts.append(f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">{timeline.makespan:g}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return (
        f"{schedule.name}: {len(schedule.ranks)} ranks, {schedule.microbatches} microbatches; "
        f"makespan {timeline.makespan:g}, largest bubble {max(timeline.bubble):g} "
        f"({100 * timeline.bubble_fraction:.1f}% idle on average), "
        f"at most {max(schedule.peak_microbatches)} live microbatches"
    )


def _legend() -> list[str]:
    parts, x = [], _LEFT
    for kind, name in _NAMES.items():
        parts.append(f'<rect x="{x}" y="24" width="18" height="12" fill="{FILLS[kind]}" stroke="#000000"/>')
        parts.append(f'<text x="{x + 24}" y="34">{name}</text>')
        x += 130
    return parts


def _box(schedule: Schedule, part: Action, x: float, y: float, wide: float, high: float) -> list[str]:
    hint = f"{part}: {_NAMES[part.kind]} of microbatch {part.microbatch} on stage {part.stage}"
    box = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" fill="{FILLS[part.kind]}" '
        f'stroke="#000000" stroke-width="0.5"><title>{hint}</title></rect>'
    )
    label = str(part.microbatch)
    if wide < 6 * len(label) + 2:
        return [box]
    line = ' text-decoration="underline"' if schedule.placement.direction(part.microbatch) else ""
    size = 9 if high < 15 else 11
    middle, base = x + wide / 2, y + high / 2 + size * 0.36
    return [
        box,
        f'<text x="{middle:.2f}" y="{base:.2f}" text-anchor="middle" font-size="{size}" fill="{_INK[part.kind]}"{line} '
        f'pointer-events="none">{label}</text>',
    ]


def draw_text(timeline: Timeline, width: int = 120) -> str:
    """Return the timeline as text: a row per rank, a letter and number per action as wide as it lasts.

    ``F3 B3 I3 W3`` are the passes of microbatch 3, ``3+1`` a forward of 3 overlapped with a backward of 1, ``.`` idle.
    """
    schedule = timeline.schedule
    longest = max((len(_label(step)) for steps in schedule.ranks for step in steps), default=1)
    shortest = min(
        (e - s for ss, ee in zip(timeline.starts, timeline.ends) for s, e in zip(ss, ee) if e > s), default=1.0
    )
    # Wide enough for a label in the shortest action, unless the terminal is too narrow for that.
    scale = min((longest + 1) / shortest, max(width - 9, 20) / timeline.makespan)
    rows = [_title(timeline)]
    for rank, steps in enumerate(schedule.ranks):
        row = ["."] * (round(timeline.makespan * scale) + 1)
        for step, start, end in zip(steps, timeline.starts[rank], timeline.ends[rank]):
            first, past = round(start * scale), round(end * scale)
            room = max(past - first - 1, 1)
            text = _label(step) if len(_label(step)) <= room else step.kind[0] if step.kind != "FB" else "+"
            row[first:past] = list(f"{text[:room]:{' '}<{room}}|"[: past - first])
        rows.append(f"rank {rank:<3} {''.join(row).rstrip('.')}")
    return "\n".join(rows)


def _label(step: Step) -> str:
    if step.kind == "FB":
        return f"{step.forward.microbatch}+{step.backward.microbatch}"
    return f"{step.kind}{step.microbatch}"
