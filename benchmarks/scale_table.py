"""What was counted as tables of docs/scale.md: a part of benchmarks/at_scale.py.

A row is a count of a phase: on the rank that has most of it, and of all ranks together. Bytes of the model's state are
counted in shares (the bytes of a checkpoint over the ranks), bytes of what describes a state in layers of a rank, so
that what grows with the world is seen apart from what is larger in a larger model. At 2,048 ranks a row is multiplied
by the shares and layers of recipe=dsv3_671b.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.scale_growth import Growth, growth

TARGET_RANKS = 2048
PHASES = {"start": 0, "build": 0, "load": 1, "save": 0, "beside": 0, "end": 0}  # phase -> the life that has it
_SMALL = ("start", "build", "beside", "end")
# What is done, its names in the tally, and in what it is counted.
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    *(
        (f"{what} {where}", tuple(f"{name}/{place}" for name in names for place in places), "count")
        for where, places in (
            ("of the checkpoint", ("checkpoint", "description")),
            ("elsewhere", ("run", "code", "other")),
        )
        for what, names in (
            ("files opened", ("opened",)),
            ("files stat'd", ("stat",)),
            ("folders listed, names changed", ("listed", "changed")),
        )
    ),
    ("tensors read", ("read/checkpoint", "mapped/checkpoint"), "share"),
    ("descriptions read", ("read/description", "mapped/description"), "layers"),
    ("other files read", ("read/run", "read/code", "read/other"), "bytes"),
    ("tensors written", ("written/checkpoint",), "share"),
    ("descriptions written", ("written/description",), "layers"),
    ("other files written", ("written/run", "written/code", "written/other"), "bytes"),
    ("messages to the store", ("store/",), "count"),
    ("calls of `new_group`", ("groups/called",), "count"),
    ("groups joined", ("groups/joined",), "count"),
    ("collectives", ("calls/",), "count"),
    ("bytes of `all_reduce`", ("bytes/all_reduce",), "bytes"),
    *(
        (f"bytes of `{name}`", (f"bytes/{name}",), "layers")
        for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
    ),
    *(
        (f"bytes of `{name}`", (f"bytes/{name}",), "share")
        for name in ("broadcast", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all",
                     "send", "recv")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The world that is reckoned: its ranks, the bytes of its checkpoint, and the layers that a rank holds."""

    ranks: int
    checkpoint_bytes: int
    layers: float

    @property
    def share(self) -> float:
        """Bytes of a rank's share of a checkpoint."""
        return self.checkpoint_bytes / self.ranks


@dataclass(frozen=True)
class Row:
    """One count: per world measured, in its unit, and how it grows."""

    phase: str
    what: str
    unit: str
    ranks: tuple[int, ...]
    busiest: tuple[float, ...]
    total: tuple[float, ...]

    @property
    def on_one(self) -> Growth:
        """How it grows on the rank that has most of it."""
        return growth(self.ranks, self.busiest)

    @property
    def in_all(self) -> Growth:
        """How it grows in all ranks together."""
        return growth(self.ranks, self.total)

    @property
    def stands_out(self) -> bool:
        """Whether it grows with the world on one rank, or faster than the world in total."""
        return self.on_one.exponent > 0.25 or self.in_all.exponent > 1.25

    def at(self, target: Target) -> tuple[float, float]:
        """Return what it comes to on the busiest rank and in all, in counts or bytes.

        Of all ranks together no more than if each were the busiest, and no less than on that one.
        """
        factor = {"count": 1.0, "bytes": 1.0, "share": target.share, "layers": target.layers}[self.unit]
        one, every = (max(0.0, grows.at(target.ranks)) * factor for grows in (self.on_one, self.in_all))
        return one, max(one, min(every, one * target.ranks))


def rows_of(measured: dict[str, Any]) -> list[Row]:
    """Return the rows of one measurement that are not nothing everywhere.

    ``measured``: world -> ``{"lives": [{phase: {name: [of each rank]}}], "share_bytes", "layers"}``.
    """
    worlds = {int(world): one for world, one in sorted(measured.items(), key=lambda item: int(item[0]))}
    rows = []
    for phase, life in PHASES.items():
        for what, names, unit in ROWS:
            unit = "bytes" if unit in ("share", "layers") and phase in _SMALL else unit
            each = [_per_rank(one["lives"][life].get(phase, {}), names, n) for n, one in worlds.items()]
            if not any(map(any, each)):
                continue
            sizes = [{"share": one["share_bytes"], "layers": one["layers"]}.get(unit, 1) for one in worlds.values()]
            rows.append(
                Row(
                    phase,
                    what,
                    unit,
                    tuple(worlds),
                    tuple(max(ranks) / size for ranks, size in zip(each, sizes)),
                    tuple(sum(ranks) / size for ranks, size in zip(each, sizes)),
                )
            )
    return rows


def _per_rank(counts: dict[str, list[int]], names: Iterable[str], ranks: int) -> list[int]:
    """Return the sum of some names on every rank; a name that ends in a slash stands for all that begin so."""
    found = [0] * ranks
    for name, each in counts.items():
        if name in names or any(prefix.endswith("/") and name.startswith(prefix) for prefix in names):
            found = [a + b for a, b in zip(found, each)]
    return found


# What is known of the target without a curve: (phase, what) -> on one rank, in all.
Exact = dict[tuple[str, str], tuple[float, float]]


def growth_table(
    columns: dict[str, dict[str, Any]], targets: dict[str, Target], exact: dict[str, Exact] | None = None
) -> str:
    """Return the table of all counts: how each grows, and what it comes to; three columns a measurement.

    ``targets``: by measurement, the world that is reckoned; ``exact``, what is known of it without a curve.
    """
    known = exact or {}
    tables = [{(row.phase, row.what): row for row in rows_of(worlds)} for worlds in columns.values()]
    head = "| phase | what |"
    for name, worlds in columns.items():
        head += f" {name}: on {max(map(int, worlds))} ranks | grows with | on {targets[name].ranks:,} ranks |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for key in [(phase, what) for phase in PHASES for what, _, _ in ROWS]:
        if any(key in table for table in tables):
            cells = [_cells(table.get(key), targets[n], known.get(n, {}).get(key)) for n, table in zip(columns, tables)]
            lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Row | None, target: Target, exact: tuple[float, float] | None) -> str:
    """Return the three cells of a row in one measurement."""
    if row is None:
        return "- | - | -"
    one, every = exact or row.at(target)
    plain = "count" if row.unit == "count" else "bytes"
    measured = f"{_show(row.busiest[-1], row.unit)}, {_show(row.total[-1], row.unit)}"
    grows = f"{_form(row.on_one, 0.25)}, {_form(row.in_all, 1.25)}"
    return f"{measured} | {grows} | {_show(one, plain)}, {_show(every, plain)}"


def _form(grows: Growth, most: float) -> str:
    return f"**{grows.form}**" if grows.exponent > most else grows.form


def _show(number: float, unit: str) -> str:
    if unit == "share":
        return f"{number:.3g} shares"
    if unit == "layers":
        return f"{show_number(number)}B a layer"
    return show_number(number) + ("B" if unit == "bytes" else "")


def show_number(number: float) -> str:
    """Return a number in three digits, with k, M, G, T for thousands."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g}E"


# -- bounds ------------------------------------------------------------------------------------------------------------

BOUNDS: dict[str, tuple[str, float]] = {
    "read_over_checkpoint": ("a resume reads, all ranks together, of a checkpoint's bytes", 1.3),
    "read_over_state": ("a resume reads, on the rank that reads most of its own state", 1.3),
    "written_over_even": ("a save writes, on the rank that writes most, of an even share", 1.2),
    "growth_over_share": ("a save that training waits for takes, in more host memory, of a rank's share", 1.2),
    "growth_beside_over_share": ("a save beside training takes, in more host memory, of a rank's share", 1.2),
}


def bounds_table(columns: dict[str, dict[str, Any]]) -> str:
    """Return the table of bounds: target, measured in every world, met or not."""
    ranks = sorted({int(world) for worlds in columns.values() for world in worlds})
    lines = [f"| | what | target | {' | '.join(f'{n} ranks' for n in ranks)} | met |", "|" + "---|" * (len(ranks) + 4)]
    for name, worlds in columns.items():
        for key, (what, most) in BOUNDS.items():
            values = {n: worlds[str(n)]["bounds"][key] for n in ranks if str(n) in worlds}
            cells = " | ".join(f"{values[n]:.2f}" if n in values else "-" for n in ranks)
            met = "yes" if max(values.values()) <= most else "**no**"
            lines.append(f"| {name} | {what} | {most} | {cells} | {met} |")
    return "\n".join(lines)
