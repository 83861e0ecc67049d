"""The table and the drawing of benchmarks/muon_vs_adamw.py."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

NAMES = {"adamw": "AdamW", "muon": "Muon"}
COLORS = {"adamw": "#1f5fa8", "muon": "#c0392b"}
WHAT = {
    "equal_tokens": "held-out loss after equal tokens, nats a token",
    "bits_per_byte": "the same in bits per byte",
    "equal_time": "held-out loss after equal time, nats a token",
}


def table(found: dict[str, Any]) -> str:
    """Return what is known of one recipe as a Markdown table: losses, as mean (lowest-highest of seeds), and costs."""
    lines = ["| | AdamW | Muon |", "|---|---|---|"]
    for trained in found.get("losses", {}).values():
        lines += _losses(trained)
    for one in found.get("costs", {}).get("by_threads", []):
        share, step = one["update_share"], one["step_median"]
        threads = f"{one['threads']} thread{'s' * (one['threads'] > 1)}"
        lines.append(f"| a step, {one['clock']}, {threads} | {step['adamw']:.2f} | {step['muon']:.2f} |")
        lines.append(f"| share of it that the update takes | {share['adamw']:.1%} | {share['muon']:.1%} |")
    return "\n".join(lines)


def _losses(trained: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of one length of training."""
    swept, seeds = trained["sweep"], trained["seeds"]
    tokens = seeds["adamw"][0]["tokens"]
    yield (
        f"| **{tokens:,} tokens** | "
        + " | ".join(f"{len(runs)} seed{'s' * (len(runs) > 1)}" for runs in seeds.values())
        + " |"
    )
    yield "| held-out loss by peak rate, one seed | " + " | ".join(map(_rates, swept.values())) + " |"
    found = trained.get("compared", {})
    for what in (what for what in WHAT if what in found):
        yield f"| {WHAT[what]} | " + " | ".join(_spread(found[what][name]) for name in NAMES) + " |"
    if reached := found.get("tokens_to_adamws_last_loss"):
        known = [count for count in reached if count is not None]
        shares = _spread([count / tokens for count in known], ".0%") if len(known) == len(reached) else "not reached"
        yield f"| tokens to AdamW's last loss | 100% | {shares} |"


def _spread(values: list[float], form: str = ".3f") -> str:
    """Return the mean of values and, of several, the lowest and the highest."""
    ends = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{ends}"


def _rates(runs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{run['rate']:.3g}: {run['held_out_loss']:.3f}" for run in runs)


def plot(found: dict[str, Any], path: str) -> None:
    """Draw the held-out losses of all seeds at the best rates, over tokens and over seconds of training,
    of the longest trainings."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    cost = found["costs"]["by_threads"][0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    longest = max(found["losses"].values(), key=lambda trained: trained["seeds"]["adamw"][0]["tokens"])
    for name, runs in longest["seeds"].items():
        for number, run in enumerate(runs):
            label = f"{NAMES[name]}, rate {run['rate']:.3g}" if number == 0 else None
            later = run["held_out"][1:]  # both begin with the same weights, at a loss that would flatten the rest
            style = {"label": label, "color": COLORS[name], "linewidth": 1.2, "marker": ".", "markersize": 3}
            axes[0].plot([tokens / 1e6 for _, tokens, _ in later], [loss for *_, loss in later], **style)
            axes[1].plot(
                [step * cost["step_median"][name] for step, *_ in later], [loss for *_, loss in later], **style
            )
    axes[0].set_xlabel("tokens, million")
    axes[1].set_xlabel(f"training, {cost['clock']}")
    axes[0].set_ylabel("held-out loss, nats a token")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, format="svg")
