"""The panels of the report: each a title, what one looks for in it, and a picture made from the facts."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

from dsv3_megatron.data.mixture.phases import mixture_of_recipe
from dsv3_megatron.report.charts import Chart, Series, draw, heat_map
from dsv3_megatron.report.facts import RunFacts
from parallel.units import BINARY

_PLAN_POINTS = 300
_COLOURS = 5  # that a chart has


def losses(facts: RunFacts) -> str:
    """Main, MTP and held-out loss."""
    series = [Series("next token", facts.curve("lm_loss")), Series("MTP", facts.curve("mtp_loss"))]
    series.append(Series("held out", facts.by_tokens(facts.events.held_out), "dots"))
    return draw(Chart(series, "tokens", "nats per token", lambda v: f"{v:.3f}", _marks(facts)))


def held_out(facts: RunFacts) -> str:
    """Held-out loss of every source."""
    series = [Series(name, facts.by_tokens(values)) for name, values in sorted(facts.events.sources.items())]
    return draw(Chart(series, "tokens", "nats per token", lambda v: f"{v:.3f}"))


def tasks(facts: RunFacts) -> str:
    """Accuracy in every task."""
    series = [Series(name, facts.by_tokens(values)) for name, values in sorted(facts.events.tasks.items())]
    return draw(Chart(series, "tokens", "share right (acc)", lambda v: f"{v:.3f}"))


def learning_rate(facts: RunFacts) -> str:
    """The plan over the whole budget, with the present position."""
    return _plan(facts, "learning rate", facts.regime.learning_rate, lambda v: f"{v:.2e}")


def batch(facts: RunFacts) -> str:
    """The batch over the whole budget, with the present position."""
    return _plan(facts, "sequences a step", facts.regime.global_batch, lambda v: f"{v:g}")


def mixture(facts: RunFacts) -> str:
    """The shares of the sources over the whole budget, the largest four apart; "" where the recipe names none."""
    curve = mixture_of_recipe(facts.recipe.data)
    if curve is None:
        return ""
    whole = facts.budget_tokens
    planned = [(t, curve(t)) for t in (whole * i // _PLAN_POINTS for i in range(_PLAN_POINTS + 1))]
    by_size = sorted(curve.names, key=lambda name: -max(shares[name] for _, shares in planned))
    apart = by_size if len(by_size) <= _COLOURS else by_size[: _COLOURS - 1]
    series = [Series(name, [(t, shares[name]) for t, shares in planned], "area") for name in apart]
    if rest := by_size[len(apart) :]:
        others = [(t, sum(shares[name] for name in rest)) for t, shares in planned]
        series.append(Series(f"{len(rest)} others", others, "area"))
    now = facts.last["tokens"] if facts.last else 0
    return draw(Chart(series, "tokens", "share of samples", lambda v: f"{v:.0%}", [(now, "now")], from_zero=True))


def _plan(facts: RunFacts, name: str, value: Callable[[int], float], show: Callable[[float], str]) -> str:
    whole = facts.budget_tokens
    planned = [(t, float(value(t))) for t in (whole * i // _PLAN_POINTS for i in range(_PLAN_POINTS + 1))]
    now = facts.last["tokens"] if facts.last else 0
    here = [(float(now), float(value(now)))]
    series = [Series("plan", planned), Series("now", here, "dots")]
    return draw(Chart(series, "tokens", name, show, from_zero=True))


def expert_load(facts: RunFacts) -> str:
    """Every expert's share of its layer's tokens, newest record."""
    if facts.loads is None:
        return heat_map([], "", "")
    note = f'<p class="none">batch of step {facts.loads["step"]:d}; MTP modules are the last rows</p>'
    return heat_map(facts.loads["loads"], "MoE layers", "experts") + note


def max_violation(facts: RunFacts) -> str:
    """How far the busiest expert of a layer is above the mean."""
    series = [Series("MaxVio of the batch", facts.curve("max_violation"))]
    series.append(Series("of the last 100 steps", facts.curve("max_violation_running")))
    return draw(Chart(series, "tokens", "MaxVio, mean over layers", lambda v: f"{v:.2f}", from_zero=True))


def attention_logits(facts: RunFacts) -> str:
    """The largest attention logit, the threshold of QK-clip and the heads that it clipped; "" without QK-clip."""
    threshold = facts.recipe.optim.qk_clip
    if threshold is None:
        return ""
    largest, clipped = facts.curve("max_attention_logit"), facts.curve("clipped_heads")
    logits, unit = [Series("largest logit of all layers", largest)], "before the softmax"
    if max((logit for _, logit in largest), default=threshold) > threshold / 20:
        ends = [(tokens, threshold) for tokens, _ in (*largest[:1], *largest[-1:])]
        logits.append(Series("threshold", ends))
    else:  # beside a line so far above, the curve would be flat
        unit += f"; threshold {threshold:.4g}"
    chart = draw(Chart(logits, "tokens", unit, lambda v: f"{v:.4g}", _marks(facts), from_zero=True))
    heads = Chart(
        [Series("clipped heads", clipped)], "tokens", "heads of the model", lambda v: f"{v:g}", from_zero=True
    )
    return chart + draw(heads)


def gradient_norm(facts: RunFacts) -> str:
    """Norm before clipping."""
    series = [Series("gradient norm", facts.curve("grad_norm"))]
    return draw(Chart(series, "tokens", "before clipping", lambda v: f"{v:.3g}", _marks(facts), logarithmic=True))


def throughput(facts: RunFacts) -> str:
    """Tokens a second of the whole job."""
    return draw(
        Chart([Series("tokens a second", facts.curve("tokens_per_second"))], "tokens", "all ranks", from_zero=True)
    )


def utilisation(facts: RunFacts) -> str:
    """TFLOP/s of a device, or MFU where the peak is known."""
    mfu = [(t, 100 * v) for t, v in facts.curve("mfu")]
    if mfu:
        return draw(
            Chart([Series("MFU", mfu)], "tokens", "% of the device's peak", lambda v: f"{v:.1f}", from_zero=True)
        )
    series = [Series("TFLOP/s of a device", facts.curve("tflops_per_device"))]
    return draw(Chart(series, "tokens", "10^12 operations a second", lambda v: f"{v:.3g}", from_zero=True))


_MEASURED_SECONDS = ("data_seconds", "pipeline_seconds", "update_seconds")


def step_time(facts: RunFacts) -> str:
    """Where a step's seconds go."""
    names = {
        "data_seconds": "data",
        "compute_seconds": "forward and backward",
        "wait_seconds": "waiting for pipeline neighbours",
        "update_seconds": "gradients and optimizer",
    }
    split = [s for s in facts.steps.sample if all(s[key] is not None for key in _MEASURED_SECONDS)]
    for step in split:
        step["wait_seconds"] = (step.get("bubble_fraction") or 0.0) * step["pipeline_seconds"]
        step["compute_seconds"] = step["pipeline_seconds"] - step["wait_seconds"]
    series = [Series(name, [(s["tokens"], s[key]) for s in split], "area") for key, name in names.items()]
    whole = Series("whole step", facts.curve("step_seconds"))
    return draw(Chart([*series, whole], "tokens", "seconds", lambda v: f"{v:.3g}", from_zero=True))


def memory(facts: RunFacts) -> str:
    """The most that any rank has held."""
    gib, limit = BINARY["GiB"], facts.recipe.cluster.memory
    rank = (facts.last or {}).get("memory_peak_rank")
    name = "peak of the rank" if rank is None else f"largest peak of all ranks, now of rank {rank}"
    series = [Series(name, [(t, b / gib) for t, b in facts.curve("memory_peak_bytes")])]
    if limit and facts.steps.first and facts.last:
        ends = (facts.steps.first["tokens"], facts.last["tokens"])
        series.append(Series("of the device", [(t, limit / gib) for t in ends]))
    return draw(Chart(series, "tokens", "GiB", lambda v: f"{v:.3g}", from_zero=True))


def schedule(facts: RunFacts) -> str:
    """The pipeline schedule of a step."""
    if facts.schedule_svg is None:
        return '<p class="none">one pipeline rank: there is no schedule to draw</p>'
    svg = re.sub(r'(<svg[^>]*?) width="\d+" height="\d+"', r"\1", facts.schedule_svg, count=1)  # as wide as the page
    return f'<div class="wide">{svg}</div>'


def events(facts: RunFacts) -> str:
    """What happened besides steps, newest first."""
    rows = []
    for event in reversed(facts.events.newest):
        details = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in event["values"].items())
        step = escape(str(event.get("step", "")))
        rows.append(
            f"<tr><td>{escape(event['time'][:19].replace('T', ' '))}</td><td>{step}</td>"
            f"<td>{escape(event['event'].replace('_', ' '))}</td><td>{escape(details)}</td></tr>"
        )
    if not rows:
        return '<p class="none">nothing but steps so far</p>'
    head = "<tr><th>time (UTC)</th><th>step</th><th>what</th><th></th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def recipe(facts: RunFacts) -> str:
    """The resolved recipe."""
    if not facts.recipe_text:
        return '<p class="none">not shown: see what is left out, above</p>'
    return f"<details><summary>recipe.yaml, resolved</summary><pre>{escape(facts.recipe_text)}</pre></details>"


def _marks(facts: RunFacts) -> list[tuple[float, str]]:
    """Return restarts, skips and rollbacks by tokens."""
    tokens = facts.steps.tokens_at
    return [
        (tokens[e["step"]], f"{e['event'].replace('_', ' ')} at step {e['step']}")
        for e in facts.events.marked
        if e["step"] in tokens
    ]


PANELS: dict[str, Callable[[RunFacts], str]] = {
    "Loss": losses,
    "Held-out loss by source": held_out,
    "Tasks": tasks,
    "Gradient norm": gradient_norm,
    "Attention logits": attention_logits,
    "Learning rate": learning_rate,
    "Batch": batch,
    "Mixture of sources": mixture,
    "Expert load": expert_load,
    "Balance of experts": max_violation,
    "Throughput": throughput,
    "Utilisation": utilisation,
    "Step time": step_time,
    "Memory": memory,
    "Pipeline schedule": schedule,
    "Events": events,
    "Recipe": recipe,
}
WIDE = ("Pipeline schedule", "Events", "Recipe")
