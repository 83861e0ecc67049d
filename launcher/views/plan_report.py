"""The plan as one HTML page that needs nothing else: numbers, memory bars by rank, the timeline of a step."""

from __future__ import annotations

from html import escape

from dsv3_megatron.planning.memory.ranks import RankMemory
from dsv3_megatron.planning.plan import Plan
from dsv3_megatron.report.page import POLICY
from launcher.views.plan import text_of
from parallel.pipeline.drawing import draw_svg
from parallel.units import GIB

_PARTS = (
    ("weights", "#1f4e79", lambda r: r.weights_bytes + r.fp8_weights_bytes),
    ("gradients", "#5b9bd5", lambda r: r.gradients_bytes),
    ("optimizer", "#9dc3e6", lambda r: r.optimizer_bytes),
    ("activations", "#d9902f", lambda r: r.activations_bytes + r.messages_bytes),
    ("reserve", "#bfbfbf", lambda r: r.fragmentation_bytes + r.reserved_bytes),
)
_LEFT, _ROW, _WIDTH = 70, 22, 900


def html_of(plan: Plan) -> str:
    """Return the page."""
    title = f"{plan.recipe.recipe} on {plan.recipe.cluster.name}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8">{POLICY}<title>{escape(title)}</title>',
        "<style>body{font-family:sans-serif;margin:2em;max-width:1700px}pre{background:#f6f6f6;padding:1em;overflow:auto}"
        "svg{max-width:100%;height:auto}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(chr(10).join(text_of(plan, advise=False)))}</pre>",
        "<h2>Memory of a GPU by pipeline rank</h2>",
        memory_bars(plan.ranks),
    ]
    if plan.step is not None:
        parts += [
            "<h2>One step, seconds</h2>",
            "<p>Vector graphics: zoom in to read the microbatches; point at a box for what it is.</p>",
            draw_svg(plan.step.timeline),
        ]
    return "\n".join([*parts, "</body></html>", ""])


def memory_bars(ranks: list[RankMemory]) -> str:
    """Return stacked bars, a row per rank, with the device's limit as a line."""
    limit = ranks[0].limit_bytes
    most = max([*(r.total_bytes for r in ranks), limit or 0])
    scale, height = (_WIDTH - _LEFT - 80) / most, 40 + _ROW * len(ranks) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#ffffff"/>'
    ]
    for number, (name, colour, _) in enumerate(_PARTS):
        left = _LEFT + 110 * number
        parts.append(
            f'<rect x="{left}" y="8" width="14" height="12" fill="{colour}"/><text x="{left + 19}" y="18">{name}</text>'
        )
    for number, rank in enumerate(ranks):
        y, x = 34 + _ROW * number, float(_LEFT)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 13}" text-anchor="end">rank {rank.pipeline_rank}</text>')
        for name, colour, size in _PARTS:
            wide = size(rank) * scale
            hint = f"rank {rank.pipeline_rank}, {name}: {size(rank) / GIB:.1f} GiB"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_ROW - 5}" fill="{colour}">'
                f"<title>{hint}</title></rect>"
            )
            x += wide
        end = max(x, _LEFT + (limit or 0) * scale) + 6
        parts.append(f'<text x="{end:.1f}" y="{y + 13}">{rank.total_bytes / GIB:.1f} GiB</text>')
    if limit:
        x, low = _LEFT + limit * scale, 34 + _ROW * len(ranks)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="28" y2="{low}" stroke="#c00000" stroke-width="2"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{low + 14}" text-anchor="middle" fill="#c00000">{limit / GIB:.0f} GiB</text>'
        )
    return "\n".join([*parts, "</svg>"])
