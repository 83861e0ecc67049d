"""The table and the drawing of benchmarks/routing_and_mtp.py: every variant a column, the same quantities of each."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, dict[str, Any]], last: int) -> str:
    """Return the comparison as a Markdown table; ``last``: over how many steps a run's end was averaged."""

    def percents(values: list[float]) -> str:
        return ", ".join(f"{value:.1%}" for value in values)

    rows = {
        "held-out loss, nats a token": lambda v: f"{v['held_out_loss']:.3f}",
        "bits per byte": lambda v: f"{v['bits_per_byte']:.3f}",
        f"training loss, last {last} steps": lambda v: f"{v['lm_loss']:.3f}",
        f"MTP loss, last {last} steps": lambda v: f"{v['mtp_loss']:.3f}",
        f"MaxVio of a batch, last {last} steps": lambda v: f"{v['max_violation']:.2f}",
        "MaxVio, running": lambda v: f"{v['max_violation_running']:.2f}",
        "choices rerouted": lambda v: f"{v['rerouted']:.2%}",
        "choices dropped": lambda v: f"{v['dropped']:.2%}",
        "MTP drafts accepted, by depth": lambda v: percents(v["acceptance"]),
        "the same, chained": lambda v: percents(v["acceptance_chained"]),
    }
    lines = [
        "| | " + " | ".join(f"{n} (`{v['recipe']}`)" for n, v in found.items()) + " |",
        "|---|" + "---|" * len(found),
    ]
    lines += [f"| {name} | " + " | ".join(show(v) for v in found.values()) + " |" for name, show in rows.items()]
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], path: str) -> None:
    """Draw loss and MaxVio of all variants."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"lm_loss": "training loss, nats a token", "max_violation_running": "MaxVio of the experts, running"}
    for axis, (key, title) in zip(axes, titles.items()):
        for (name, values), color in zip(found.items(), ("#1f5fa8", "#c0392b")):
            axis.plot(range(1, len(values["curves"][key]) + 1), values["curves"][key], label=name, color=color)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, format="svg")
