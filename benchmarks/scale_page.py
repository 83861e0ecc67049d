"""The tables of docs/scale.md, from benchmarks/results/at_scale.json: a part of benchmarks/at_scale.py.

Each stands in the page between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.page_tables import filled
from benchmarks.scale_groups import mesh_connections, mesh_messages
from benchmarks.scale_table import TARGET_RANKS, Exact, Target, bounds_table, growth_table, show_number
from dsv3_megatron.model.costs import count_parameters
from launcher.command_line.compose import compose
from parallel.units import GIB
from testing.counting.collectives import PAIRS

RECIPE = "dsv3_671b"
MIB = 1 << 20
# Buffers of one NCCL connection in one channel (NCCL 2.18 to 2.28: computeBuffSizes, device.h): LL has 8 lines of 16
# bytes for each of 512 threads, LL128 120 elements of 8 bytes for each of 640, both eight steps deep; Simple 4 MiB.
NCCL_BUFFERS = {"LL": 8 * 512 * 8 * 16, "LL128": 120 * 640 * 8 * 8, "Simple": 4 * MIB}
CHANNELS = (2, 8, 16, 32)


def bytes_of_a_parameter(worlds: dict[str, Any]) -> float:
    """Return what the checkpoints that were measured hold of one parameter, in the largest world."""
    ranks = max(map(int, worlds))
    return worlds[str(ranks)]["share_bytes"] * ranks / worlds[str(ranks)]["parameters"]


def target(worlds: dict[str, Any]) -> Target:
    """Return the world that is reckoned, by its recipe; a parameter takes as many bytes as in those measured, which
    have the same precisions."""
    recipe = compose([f"recipe={RECIPE}"])
    model = recipe.model
    layers = (model.num_hidden_layers + model.num_nextn_predict_layers) / recipe.parallel.pipeline
    return Target(TARGET_RANKS, round(_parameters() * bytes_of_a_parameter(worlds)), 2 * layers)


def _parameters() -> int:
    counted = count_parameters(compose([f"recipe={RECIPE}"]).model)
    return counted.main + counted.mtp


def with_tables(page: str, results: dict[str, Any]) -> str:
    """Return the page with its tables written anew. Raises KeyError: it asks for a table that there is not."""
    return filled(page, tables_of(results))


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Return every table by its name."""
    columns = results["columns"]
    worlds = {name: column["worlds"] for name, column in columns.items()}
    return {
        "sizes": _sizes(worlds),
        "growth": growth_table(
            worlds,
            {name: target(of) for name, of in worlds.items()},
            {name: _exact(column) for name, column in columns.items()},
        ),
        "bounds": bounds_table(worlds),
        "imports": _imports(columns),
        "groups": _groups(columns),
        "start": _start(columns),
        "starts": _starts(results["starts"]),
        "nccl": _nccl(columns),
        "machine": _machine(columns),
    }


def _exact(column: dict[str, Any]) -> Exact:
    """Return what making the groups of the target has shown, and the messages that full meshes take, if those are the
    messages counted in every world that was run."""
    groups = column["groups"]
    sizes = [size for _, size in groups["joined"]]
    one = {"calls of `new_group`": groups["calls"], "groups joined": len(sizes) - 1}
    if all(map(_has_full_meshes, column["worlds"].values())):
        one["messages to the store"] = mesh_messages(sizes)
    return {("start", what): (number, number * TARGET_RANKS) for what, number in one.items()}


def _has_full_meshes(world: dict[str, Any]) -> bool:
    """Return whether rank 0 has sent the store just the messages that connect all members of its groups."""
    sent = (ranks[0] for name, ranks in world["lives"][0]["start"].items() if name.startswith("store/"))
    return sum(sent) == mesh_messages([size for _, size in world["joined"]])


def _table(head: str, *lines: str) -> str:
    return "\n".join((head, "|" + "---|" * (head.count("|") - 1), *lines))


def _sizes(worlds: dict[str, Any]) -> str:
    targets = {name: (bytes_of_a_parameter(one), target(one)) for name, one in worlds.items()}

    def row(what: str, cells: list[str]) -> str:
        return f"| {what} | {' | '.join(cells)} |"

    return _table(
        row(f"`{RECIPE}` on {TARGET_RANKS:,} ranks", list(targets)),
        row("parameters, MTP module included", [f"{_parameters():,}" for _ in targets]),
        row("bytes of one in a checkpoint, as measured", [f"{each:.1f}" for each, _ in targets.values()]),
        row("checkpoint", [f"{show_number(of.checkpoint_bytes)}B" for _, of in targets.values()]),
        row("a rank's share of it", [f"{show_number(of.share)}B" for _, of in targets.values()]),
        row(
            "layers of a rank: its two stages of 16, the MTP module as one",
            [f"{of.layers:g}" for _, of in targets.values()],
        ),
    )


def _imports(columns: dict[str, Any]) -> str:
    lines = []
    for name, column in columns.items():
        found = {k: v for k, v in column["imports"].items() if not k.endswith("/system")}
        for what in ("opened", "stat", "listed", "read"):
            number = sum(v for k, v in found.items() if k.startswith(f"{what}/"))
            unit = "B" if what == "read" else ""
            lines.append(
                f"| {name} | {what} | {show_number(number)}{unit} | {show_number(number * TARGET_RANKS)}{unit} |"
            )
    return _table(f"| | importing | a rank | {TARGET_RANKS:,} ranks |", *lines)


def _groups(columns: dict[str, Any]) -> str:
    """Which groups a rank is in, and which of them carry messages in real runs of the same kind of layout."""
    lines, column = [], list(columns.values())[-1]
    used = _used(column)
    for description, size in column["groups"]["joined"]:
        pairs = "between pairs" if f"{description}{PAIRS}" in used else "no, one rank" if size == 1 else "no"
        lines.append(f"| `{description}` | {size:,} | {'yes' if description in used else pairs} |")
    return _table("| group | ranks | carries messages |", *lines)


def _used(column: dict[str, Any]) -> set[str]:
    """Return the descriptions of the groups that carried messages on more than one rank in the largest world."""
    largest = column["worlds"][max(column["worlds"], key=int)]
    names = {name for name, size in largest["groups_used"] if size > 1}
    return names


def _start(columns: dict[str, Any]) -> str:
    lines = []
    for name, column in columns.items():
        sizes = [size for _, size in column["groups"]["joined"]]
        messages, connections = mesh_messages(sizes), mesh_connections(sizes)
        rows = (
            ("calls of `new_group`", column["groups"]["calls"], column["groups"]["calls"] * TARGET_RANKS),
            ("groups joined, the default one among them", len(sizes), len(sizes) * TARGET_RANKS),
            ("messages to the store, were all members connected at once", messages, messages * TARGET_RANKS),
            ("connections, were all members connected at once", connections, connections * TARGET_RANKS // 2),
        )
        lines += [f"| {name} | {what} | {one:,} | {show_number(every)} |" for what, one, every in rows]
        lines.append(f"| {name} | seconds in `build_groups` | {column['groups']['seconds']:.1f} | |")
    return _table("| | to make the groups | one rank | in all |", *lines)


def _starts(starts: dict[str, Any]) -> str:
    lines = []
    for world, modes in starts.items():
        cells = [
            f"{modes[mode][what]:,.{digits}f}"
            for what, digits in (("messages", 0), ("connections", 0), ("seconds", 2))
            for mode in ("mesh", "lazy")
        ]
        lines.append(f"| {world} | {' | '.join(cells)} |")
    kinds = ("all at once", "at the first message")
    what = " | ".join(
        f"{what}, {kind}" for what in ("messages to the store", "connections", "seconds") for kind in kinds
    )
    return _table(f"| ranks | {what} |", *lines)


def _nccl(columns: dict[str, Any]) -> str:
    """What the rings of the communicators hold, by channels: a connection to the next rank and one from the last."""
    ring = 2 * sum(NCCL_BUFFERS.values())
    reserve = compose([f"recipe={RECIPE}"]).cluster.reserved
    column = list(columns.values())[-1]
    number = sum(description in _used(column) and size > 1 for description, size in column["groups"]["joined"])
    cells = [f"{number * channels * ring / GIB:.2f} GiB" for channels in CHANNELS]
    head = " | ".join(f"{channels} channels" for channels in CHANNELS)
    return _table(
        f"| communicators of a rank | {head} | planner's reserve |",
        f"| {number} | {' | '.join(cells)} | {reserve / GIB:.0f} GiB |",
    )


def _machine(columns: dict[str, Any]) -> str:
    lines = [
        f"| {name} | `{c['command']}` | {c['machine']['cpus']} CPUs, Python {c['machine']['python']}, "
        f"torch {c['machine']['torch']} |"
        for name, c in columns.items()
    ]
    return _table("| | command | machine |", *lines)
