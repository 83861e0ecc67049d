"""The page around the panels: head, style, numbers on top."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from dsv3_megatron.model.costs import count_parameters
from dsv3_megatron.report.facts import RunFacts, read_run
from dsv3_megatron.report.panels import PANELS, WIDE
from dsv3_megatron.report.sound import short
from dsv3_megatron.run.files import write_atomically
from dsv3_megatron.run.reasons import reason_of
from parallel.units import show_count, show_duration

_REFRESH_SECONDS = 60
# A browser loads nothing from anywhere, runs nothing and sends nothing.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'\">"
)


def write_report(directory: Path) -> Path:
    """Write report.html of a run directory, whole or not at all; return its path."""
    path = directory / "report.html"
    write_atomically(path, page(read_run(directory)))
    return path


def page(facts: RunFacts) -> str:
    """Return the report as one document. Its own policy forbids a browser to load anything from anywhere."""
    refresh = "" if facts.finished else f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">'
    sections = "".join(
        f"<section{' class=full' if title in WIDE else ''}><h2>{title}</h2>{content}</section>"
        for title, panel in PANELS.items()
        if (content := _content(panel, facts))
    )
    name = escape(facts.recipe.run.name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"{POLICY}"
        f'{refresh}<link rel="icon" href="data:,"><title>{name}</title><style>{_STYLE}</style></head><body>'
        f"<header><h1>{name}</h1>{_numbers(facts)}</header><main>{sections}</main>"
        f"<footer>written {datetime.now(UTC).isoformat(sep=' ', timespec='seconds')[:19]} UTC</footer></body></html>\n"
    )


def _content(panel: Callable[[RunFacts], str], facts: RunFacts) -> str:
    """Return what is in a panel, or why nothing is: one that cannot be drawn costs the others nothing."""
    try:
        return panel(facts)
    except Exception as error:
        return f'<p class="none">not drawn: {escape(reason_of(error)[:200])}</p>'


def _numbers(facts: RunFacts) -> str:
    last = facts.last
    world = facts.environment.get("world")
    size = world.get("size") if isinstance(world, dict) else None
    shown = {"state": "finished" if facts.finished else "running or stopped", "recipe": facts.recipe.recipe}
    if last:
        of = f" of {facts.recipe.run.steps}" if facts.recipe.run.steps else ""
        shown |= {
            "step": f"{last['step']}{of}",
            "tokens": f"{show_count(last['tokens'])} of {show_count(facts.budget_tokens)}",
            "loss": _shown(last["lm_loss"], lambda loss: f"{loss:.4f}"),
            "tokens a second": _shown(last["tokens_per_second"], show_count),
            "training": show_duration(facts.steps.seconds),
            "skipped": _shown(last["skipped"], str),
        }
    if facts.effective_time is not None:
        shown["effective time"] = f"{facts.effective_time:.0%}"
    if isinstance(size, int):
        shown["ranks"] = short(size)
    shown["precision"] = facts.recipe.precision.name
    if facts.recipe.model.freeze:
        counted = count_parameters(facts.recipe.model)
        shown["trained"] = f"{show_count(counted.trained)} of {show_count(counted.trained + counted.frozen)} parameters"
    commit = facts.environment.get("git_commit")
    if isinstance(commit, str) and commit:
        shown["commit"] = commit[:9] + (" + changes" if facts.environment.get("git_changed") else "")
    if facts.left_out:
        shown["left out"] = "; ".join(facts.left_out)
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items())
    return f"<dl>{items}</dl>"


def _shown(value: Any, show: Callable[[Any], str]) -> str:
    return show(value) if isinstance(value, int | float) else "not a number"


_STYLE = (
    """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5b6673;--line:#dfe3e8;--c0:#1659b5;--c1:#c2571a;--c2:#1d7a46;
--c3:#7b3fa0;--c4:#55606c;--h0:#f1f5fb;--h1:#d9e6f7;--h2:#b9d2f0;--h3:#8fb8e6;--h4:#5f98d8;--h5:#3676c2;--h6:#1f57a0;
--h7:#123b78;--h8:#081f4a}
@media(prefers-color-scheme:dark){:root{--bg:#10151b;--card:#19212a;--ink:#e6ebf0;--soft:#98a4b1;--line:#2c3743;
--c0:#6fa8f5;--c1:#f09a5b;--c2:#62c98d;--c3:#c692e6;--c4:#a8b3bf;--h0:#141d28;--h1:#17283d;--h2:#1a3558;--h3:#1d4678;
--h4:#245c9e;--h5:#3d7dc4;--h6:#6aa3e0;--h7:#a3c8f0;--h8:#e3effb}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header,main,footer{max-width:1320px;margin:auto;padding:16px}h1{margin:0 0 8px;font-size:24px;overflow-wrap:anywhere}
h2{margin:0 0 8px;font-size:15px}dl{display:flex;flex-wrap:wrap;gap:6px 22px;margin:0}dt{font-size:12px;
color:var(--soft)}dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
main{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;min-width:0}
.full{grid-column:1/-1}svg{display:block;width:100%;height:auto}svg text{font-size:12px;fill:var(--soft)}
.wide{overflow-x:auto}.wide svg{min-width:900px;background:#fff}.wide svg text{font-size:revert-layer;
fill:revert-layer}
.grid{stroke:var(--line);fill:none}.mark{stroke:var(--c1);stroke-dasharray:3 3;fill:none;stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin-top:4px}.legend i{display:inline-block;
width:12px;height:10px;margin-right:5px;border-radius:2px}.legend b{font-variant-numeric:tabular-nums}
.unit{color:var(--soft);margin-left:auto}.unit i{margin:0;border-radius:0}
.none{color:var(--soft);font-size:13px;margin:6px 0}@media(max-width:600px){svg text{font-size:18px}}
table{border-collapse:collapse;font-size:13px;width:100%}td,th{text-align:left;padding:3px 14px 3px 0;
border-bottom:1px solid var(--line);white-space:nowrap}pre{overflow:auto;font-size:12.5px;max-height:70vh}
summary{cursor:pointer}footer{color:var(--soft);font-size:13px}.heat{width:100%}
"""
    + "".join(
        f".l{n}{{fill:none;stroke:var(--c{n});stroke-width:1.8;stroke-linejoin:round}}.s{n}{{fill:var(--c{n})}}"
        f".a{n}{{fill:var(--c{n})}}.k{n}{{background:var(--c{n})}}"
        for n in range(5)
    )
    + "".join(f".h{n}{{fill:var(--h{n});background:var(--h{n})}}" for n in range(9))
)
