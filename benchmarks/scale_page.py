"""The tables of docs/scale.md, from benchmarks/results/at_scale.json: a part of benchmarks/at_scale.py.

Each stands in the page between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.scale_groups import mesh_connections, mesh_messages
from benchmarks.scale_table import TARGET_RANKS, Target, bounds_table, growth_table, show_number
from dsv3_megatron.model.costs import count_parameters
from launcher.command_line.compose import compose
from parallel.units import GIB

RECIPE = "dsv3_671b"
# A parameter in a checkpoint: BF16 weight, float32 master, two BF16 moments, float32 average.
BYTES_OF_A_PARAMETER = 2 + 4 + 2 * 2 + 4
MIB = 1 << 20
# Buffers of one NCCL connection in one channel (NCCL 2.18 to 2.28: computeBuffSizes, device.h): LL has 8 lines of 16
# bytes for each of 512 threads, LL128 120 elements of 8 bytes for each of 640, both eight steps deep; Simple 4 MiB.
NCCL_BUFFERS = {"LL": 8 * 512 * 8 * 16, "LL128": 120 * 640 * 8 * 8, "Simple": 4 * MIB}
CHANNELS = (2, 8, 16, 32)


def target() -> Target:
    """Return the world that is reckoned, by its recipe."""
    recipe = compose([f"recipe={RECIPE}"])
    model = recipe.model
    layers = (model.num_hidden_layers + model.num_nextn_predict_layers) / recipe.parallel.pipeline
    parameters = count_parameters(model)
    return Target(TARGET_RANKS, (parameters.main + parameters.mtp) * BYTES_OF_A_PARAMETER, 2 * layers)


def with_tables(page: str, results: dict[str, Any]) -> str:
    """Return the page with its tables written anew. Raises KeyError: it asks for a table that there is not."""
    tables = tables_of(results)
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(\n<!-- end -->)",
        lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}",
        page,
        flags=re.S,
    )


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Return every table by its name."""
    columns = results["columns"]
    worlds = {name: column["worlds"] for name, column in columns.items()}
    return {
        "sizes": _sizes(target()),
        "growth": growth_table(worlds, target()),
        "bounds": bounds_table(worlds),
        "imports": _imports(columns),
        "groups": _groups(columns),
        "start": _start(columns),
        "starts": _starts(columns),
        "nccl": _nccl(columns),
        "machine": _machine(columns),
    }


def _table(head: str, *lines: str) -> str:
    return "\n".join((head, "|" + "---|" * (head.count("|") - 1), *lines))


def _sizes(of: Target) -> str:
    parameters = of.checkpoint_bytes // BYTES_OF_A_PARAMETER
    return _table(
        f"| `{RECIPE}` on {of.ranks:,} ranks | |",
        f"| parameters, MTP module included | {parameters:,} |",
        f"| bytes of one in a checkpoint: BF16 weight, float32 master, two BF16 moments, float32 average | "
        f"{BYTES_OF_A_PARAMETER} |",
        f"| checkpoint | {show_number(of.checkpoint_bytes)}B |",
        f"| a rank's share of it | {show_number(of.share)}B |",
        f"| layers of a rank: its two stages of 16, the MTP module as one | {of.layers:g} |",
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
    lines = []
    for name, column in columns.items():
        used = _used(column)
        for description, size in column["groups"]["joined"]:
            carries = "yes" if description in used else "no, one rank" if size == 1 else "no"
            lines.append(f"| {name} | `{description}` | {size:,} | {carries} |")
    return _table("| | group | ranks | carries messages |", *lines)


def _used(column: dict[str, Any]) -> set[str]:
    """Return the descriptions of the groups that carried messages on more than one rank in the largest world."""
    largest = column["worlds"][max(column["worlds"], key=int)]
    names = {name for name, size in largest["groups_used"] if size > 1}
    return {"union of mirrored ranks" if name == "undefined" else name for name in names}


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


def _starts(columns: dict[str, Any]) -> str:
    lines = []
    for name, column in columns.items():
        for world, modes in column.get("starts", {}).items():
            cells = [
                f"{modes[mode][what]:,.{digits}f}"
                for what, digits in (("messages", 0), ("connections", 0), ("seconds", 2))
                for mode in ("mesh", "lazy")
            ]
            lines.append(f"| {name} | {world} | {' | '.join(cells)} |")
    what = " | ".join(f"{what}, {how}" for what in ("messages", "connections", "seconds") for how in ("mesh", "lazy"))
    return _table(f"| | ranks | {what} |", *lines)


def _nccl(columns: dict[str, Any]) -> str:
    """What the rings of the communicators hold, by channels: a connection to the next rank and one from the last."""
    lines, ring = [], 2 * sum(NCCL_BUFFERS.values())
    reserve = compose([f"recipe={RECIPE}"]).cluster.reserved
    for name, column in columns.items():
        joined = [d for d, size in column["groups"]["joined"] if d in _used(column) and size > 1]
        number = len(joined)
        cells = [f"{number * channels * ring / GIB:.2f} GiB" for channels in CHANNELS]
        lines.append(f"| {name} | {number} | {' | '.join(cells)} | {reserve / GIB:.0f} GiB |")
    head = " | ".join(f"{channels} channels" for channels in CHANNELS)
    return _table(f"| | communicators of a rank | {head} | planner's reserve |", *lines)


def _machine(columns: dict[str, Any]) -> str:
    lines = [
        f"| {name} | `{c['command']}` | {c['machine']['cpus']} CPUs, Python {c['machine']['python']}, "
        f"torch {c['machine']['torch']} |"
        for name, c in columns.items()
    ]
    return _table("| | command | machine |", *lines)
