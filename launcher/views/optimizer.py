"""show=optimizer: what updates every parameter, as which matrices, and the states kept, off the modules as built."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

from dsv3_megatron.planning.memory.ranks import bytes_of_number
from dsv3_megatron.recipe import Recipe
from launcher.views.layers import collapsed, shape_of, without_number
from parallel.units import show_bytes

# States by their names in checkpoints; AdamW's second moment goes with its first.
_SHORT = {"momentum_buffer": "momentum", "exp_avg": "2 moments", "master": "master"}
_NAMES = {"muon": "Muon", "adamw": "AdamW", "frozen": "-"}


def show_optimizer(recipe: Recipe, *, as_json: bool) -> str:
    """Return the table of a recipe as text or JSON, and what it adds up to."""
    warnings.filterwarnings("ignore")
    parameters = updated_as_built(recipe)
    totals = _totals(parameters)
    if as_json:
        return json.dumps({"optimizer": recipe.optim.name, "parameters": parameters, "totals": totals})
    header = ("parameter, as in checkpoints", "layers", "shape", "by", "matrices", "states", "why")
    rows = [header, *collapsed(_rows(parameters))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    lines = [
        f"optim.name={recipe.optim.name}: which optimizer updates what (layers that agree are shown as a range)",
        "",
        *("  " + "  ".join(f"{v:<{w}}" for v, w in zip(row, [*widths, 0])) for row in rows),
        "",
    ]
    for name, each in totals.items():
        states = f"{show_bytes(each['state_bytes'])} of states" if name != "frozen" else "no states"
        matrices = f", {each['matrices']:,} matrices" if each["matrices"] else ""
        if each["parameters"]:
            lines.append(
                f"  {_NAMES[name] if name != 'frozen' else name:<8}{each['parameters']:>19,}  {states}{matrices}"
            )
    lines.append("  states are those of all ranks together: ZeRO-1 divides them")
    return "\n".join(lines)


def updated_as_built(recipe: Recipe) -> list[dict[str, Any]]:
    """Return, of every parameter as checkpoints name it, its whole shape, what updates it, the matrices that it is, the
    states kept with their formats, their bytes, and why.

    Raises: RecipeError: no rule says what a matrix is in one.
    """
    # torch and megatron-core: seconds, which a refused recipe need not wait for
    from dsv3_megatron.optim.matrices import matrices_in, rule_of
    from dsv3_megatron.planning.update.holdings import table_of
    from dsv3_megatron.planning.whole_model import parameters_in_checkpoints

    table, found = table_of(recipe), []
    split: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}  # layers that agree are split once
    for key, shape, trained in parameters_in_checkpoints(recipe):
        if not trained:
            found.append(_row(recipe, key, shape, "frozen", [], "model.freeze"))
            continue
        rule = rule_of(key, shape, table)
        alike = (without_number(key), shape)
        if alike not in split:
            counted = Counter(matrix.shape for matrix in matrices_in(key, shape, table))
            split[alike] = [{"count": many, "shape": list(one)} for one, many in counted.items()]
        found.append(_row(recipe, key, shape, "muon" if rule.split else "adamw", split[alike], rule.why))
    return found


def _row(
    recipe: Recipe, key: str, shape: tuple[int, ...], by: str, matrices: list[dict[str, Any]], why: str
) -> dict[str, Any]:
    moments = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq"), "frozen": ()}[by]
    states = dict.fromkeys(moments, recipe.precision.moments)
    nbytes = bytes_of_number(recipe, moments=len(moments)) if moments else 0
    if moments and bytes_of_number(recipe, moments=0):
        states["master"] = "fp32"
    return {
        "name": key,
        "shape": list(shape),
        "updated_by": by,
        "matrices": matrices,
        "states": states,
        "state_bytes": nbytes * prod(shape),
        "why": why,
    }


def _totals(parameters: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return parameters, matrices and bytes of states by what updates them."""
    found = {by: {"parameters": 0, "matrices": 0, "state_bytes": 0} for by in _NAMES}
    for each in parameters:
        total = found[each["updated_by"]]
        total["parameters"] += prod(each["shape"])
        total["matrices"] += sum(matrix["count"] for matrix in each["matrices"])
        total["state_bytes"] += each["state_bytes"]
    return found


def _rows(parameters: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table, a parameter each."""
    for each in parameters:
        matrices = " and ".join(f"{m['count']:,} of {shape_of(m['shape'])}" for m in each["matrices"]) or "-"
        states = ", ".join(f"{_SHORT[name]} {form}" for name, form in each["states"].items() if name in _SHORT)
        yield (
            each["name"],
            shape_of(each["shape"]),
            _NAMES[each["updated_by"]],
            matrices,
            states or "-",
            "frozen: model.freeze" if each["updated_by"] == "frozen" else each["why"],
        )
