"""show=regime: everything that changes over a run, as a table of its phases, a plot, or the values at one moment."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from dsv3_megatron.data.mixture.phases import MixtureCurve, MixturePiece, mixture_of_recipe
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from launcher.command_line.output import write_output
from parallel.units import show_count

COLUMNS = ("learning_rate", "global_batch", "mtp_weight", "bias_speed", "balance_weight")
_TITLES = {
    "learning_rate": "learning rate",
    "global_batch": "batch, sequences",
    "mtp_weight": "MTP weight",
    "bias_speed": "router-bias speed",
    "balance_weight": "balance-loss weight",
}
_POINTS = 800


def show_regime(recipe: Recipe, *, as_json: bool, at: int | None = None, svg: Path | None = None) -> str:
    """Return the regime of a recipe, or its values after ``at`` tokens; the text of all of it also writes a plot.

    ``svg``: where to; None = ``<recipe>_regime.svg``.
    """
    regime = Regime(recipe.optim, recipe.data.sequence_length)
    mixture = mixture_of_recipe(recipe.data)
    if at is not None:
        values = values_at(regime, at)
        shares = mixture(at) if mixture else {}
        if as_json:
            return json.dumps(values | ({"mixture": shares} if mixture else {}))
        named = {**values, **{f"share of {name}": f"{share:.4g}" for name, share in shares.items()}}
        return "\n".join(f"{name:<16} {value}" for name, value in named.items())
    end = _end(recipe, regime)
    rows = [values_at(regime, tokens) for tokens in moments(regime, end)]
    mixed = [] if mixture is None else [piece for piece in mixture.pieces if piece.start < end]
    if as_json:
        found: dict[str, Any] = {"recipe": recipe.recipe, "tokens": end, "steps": _step(regime, end), "phases": rows}
        if mixed:
            found["mixture"] = [_phase(piece) for piece in mixed]
        return json.dumps(found)
    svg = svg or Path(f"{recipe.recipe}_regime.svg")
    plot(recipe.recipe, regime, end, svg, mixture)
    return f"{_table(recipe, regime, rows, end)}{_table_of_shares(regime, mixture, mixed)}\nplot: {svg}"


def values_at(regime: Regime, tokens: int) -> dict[str, float | int]:
    """Return what is in force for the step that begins after ``tokens`` tokens."""
    values = {name: getattr(regime, name)(tokens) for name in COLUMNS}
    return {"tokens": tokens, **values, "sequence_length": regime.sequence_length}


def moments(regime: Regime, end: int) -> list[int]:
    """Return the token counts at which a phase of some curve begins or ends, up to the end of the run."""
    found = {0, end}
    for curve in regime.curves().values():
        found |= {edge for piece in curve.pieces for edge in (piece.start, piece.end) if edge <= end}
    return sorted(found)


def edges_of(mixture: MixtureCurve, end: int) -> list[int]:
    """Return the token counts at which a phase of the mixture begins, and that of the end of the run."""
    return sorted({piece.start for piece in mixture.pieces if piece.start < end} | {end})


def _end(recipe: Recipe, regime: Regime) -> int:
    """Return the tokens of the whole run."""
    ends = [] if recipe.run.tokens is None else [recipe.run.tokens]
    if recipe.run.steps is not None:
        ends.append(regime.tokens_of_step(recipe.run.steps))
    return min(ends)


def _step(regime: Regime, tokens: int) -> int:
    """Return how many steps begin before so many tokens are consumed."""
    return bisect_left(_Steps(regime), tokens)


class _Steps:
    """The tokens at which steps begin, as a sequence that bisect can search."""

    def __init__(self, regime: Regime):
        self._regime = regime

    def __len__(self) -> int:
        return 1 << 24

    def __getitem__(self, step: int) -> int:
        return self._regime.tokens_of_step(step)


def _table(recipe: Recipe, regime: Regime, rows: list[dict[str, float | int]], end: int) -> str:
    names = ("tokens", "step", *COLUMNS)
    lines = [f"regime of recipe={recipe.recipe}: {show_count(end)} tokens of {regime.sequence_length} a sequence", ""]
    lines.append("  ".join(f"{name:>14}" for name in names))
    for row in rows:
        shown = {**row, "tokens": _exact(int(row["tokens"])), "step": f"{_step(regime, int(row['tokens'])):,}"}
        shown["learning_rate"] = f"{row['learning_rate']:.4g}"
        lines.append("  ".join(f"{shown[name]:>14}" for name in names))
    lines += ["", "  each row: what is in force from there; between two rows a value stays, rises or falls evenly,"]
    lines += ["  or follows a cosine, as the recipe's phases say"]
    return "\n".join(lines)


def _phase(piece: MixturePiece) -> dict[str, Any]:
    """Return a phase of the mixture as plain values; ``until`` null: the last."""
    at, to = ({name: float(share) for name, share in table.items()} for table in (piece.first, piece.last))
    return {"tokens": piece.start, "until": piece.end, "at": at, "to": to}


def _table_of_shares(regime: Regime, mixture: MixtureCurve | None, pieces: Sequence[MixturePiece]) -> str:
    """Return the phases of the mixture as a table, "" where the recipe names none."""
    if mixture is None:
        return ""
    widths = {name: max(14, len(name)) for name in ("tokens", "step", *mixture.names)}
    lines = ["", "", "share of samples of each source:", ""]
    lines.append("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for piece in pieces:
        shown = {"tokens": _exact(piece.start), "step": f"{_step(regime, piece.start):,}"}
        for name in mixture.names:
            first, last = (f"{float(table.get(name, 0)):.4g}" for table in (piece.first, piece.last))
            shown[name] = first if first == last else f"{first} to {last}"
        lines.append("  ".join(f"{shown[name]:>{width}}" for name, width in widths.items()))
    return "\n".join(lines)


def _exact(tokens: int) -> str:
    """Return a token count without rounding: 14.633T, 25,369,247,744."""
    short = show_count(tokens) if tokens else "0"
    for suffix, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        for digits in range(1, 6):
            if tokens >= scale and round(tokens / scale, digits) * scale == tokens:
                return f"{tokens / scale:.{digits}f}".rstrip("0").rstrip(".") + suffix
    return f"{tokens:,}" if tokens >= 1000 else short


def shown(name: str) -> str:
    """Return a name as Matplotlib writes it: a dollar begins no formula, and none is a label that is left out."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def plot(name: str, regime: Regime, end: int, path: Path, mixture: MixtureCurve | None = None) -> None:
    """Draw every curve over the tokens of the run. Raises RecipeError when the file cannot be written."""
    import matplotlib  # half a second, which the other forms need not wait for  # a second to import, for plot= alone

    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # after its backend is chosen
    from matplotlib.ticker import FuncFormatter

    edges = sorted({*moments(regime, end), *(edges_of(mixture, end) if mixture else ())})
    ticks = sorted({round(end * i / _POINTS) for i in range(_POINTS + 1)} | {max(0, e - 1) for e in edges} | {*edges})
    count = len(COLUMNS) + (mixture is not None)
    figure, axes = plt.subplots(count, 1, sharex=True, figsize=(9, 1.8 * count), layout="constrained")
    for axis, column in zip(axes, COLUMNS):
        curve = getattr(regime, column)
        axis.plot(ticks, [curve(tokens) for tokens in ticks], color="#1f5fa8", linewidth=1.6)
        axis.set_ylabel(_TITLES[column], rotation=0, ha="right", va="center")
    if mixture is not None:
        shares = [mixture(tokens) for tokens in ticks]
        axes[-1].stackplot(
            ticks,
            [[each[name] for each in shares] for name in mixture.names],
            labels=[shown(name) for name in mixture.names],
        )
        axes[-1].set_ylabel("share of samples", rotation=0, ha="right", va="center")
        axes[-1].legend(loc="center left", fontsize="small", ncols=-(-len(mixture.names) // 6))
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        for edge in edges[1:-1]:
            axis.axvline(edge, color="#c0392b", alpha=0.25, linewidth=0.8)
    axes[0].set_title(f"training regime of recipe={shown(name)}", loc="left")
    axes[-1].set_xlabel("tokens consumed (red: a phase ends)")
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: show_count(x)))
    drawn = BytesIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    write_output(path, drawn.getvalue(), "svg")
