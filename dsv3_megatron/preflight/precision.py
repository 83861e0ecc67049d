"""Can this machine do what the recipe's precision says? Asked before data, process groups or weights exist."""

from __future__ import annotations

import torch

from dsv3_megatron.precision import transformer_engine
from dsv3_megatron.precision.hopper import why_not
from dsv3_megatron.precision.on_te import deviations
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.preflight.fp8_shapes import check_shapes
from dsv3_megatron.preflight.world import OVERLAPPING
from dsv3_megatron.recipe import Recipe
from parallel.errors import LayoutError, RecipeError
from parallel.settings import ParallelSettings


def check_precision(recipe: Recipe, backend: str, device: torch.device) -> list[str]:
    """Return what a person should know of how the precision is carried out here, a line each.

    Raises: UserError: it cannot be, in one line naming what stands in the way.
    """
    fp8 = recipe.precision.fp8
    if fp8 is None:
        return []
    if backend == "torch":
        if fp8.hold_weights:
            raise RecipeError(
                "precision.fp8.hold_weights = true is Transformer Engine's; set hold_weights=false, or backend=te"
            )
        reason = why_not(fp8, device)
        how = f"emulated ({reason})" if reason else "by torch's block-scaled products where shapes allow"
        return [f"FP8 of linear layers is {how}; formats: launcher/plan.py show=precision"]
    _check_delayed_layout(fp8, recipe.parallel)
    check_shapes(recipe)
    remark = transformer_engine.check_installed(fp8, device)
    return [*([remark] if remark else []), *deviations(fp8)]


def _check_delayed_layout(fp8: Fp8Settings, parallel: ParallelSettings) -> None:
    """Raise LayoutError where delayed scaling meets what TE or megatron-core cannot do with it."""
    if fp8.scaling != "delayed":
        return
    if parallel.schedule in OVERLAPPING:
        raise LayoutError(
            f"precision.fp8.scaling = delayed under parallel.schedule={parallel.schedule} would train without "
            "FP8 on te (megatron-core's overlapped plan opens no autocast for it); set scaling=current, or "
            "schedule=1f1b"
        )
    if parallel.pipeline > 1:
        raise LayoutError(
            f"precision.fp8.scaling = delayed over parallel.pipeline = {parallel.pipeline} would reduce amaxes over "
            "ranks that hold other layers and come there at other times; set parallel.pipeline=1, or scaling=current"
        )
    if twice := {"norm", "moe_act"} & set(parallel.recompute):
        raise LayoutError(
            f"parallel.recompute = [{', '.join(sorted(twice))}] cannot go with precision.fp8.scaling = delayed on te "
            "(the layer after it would have to quantise its input a second time); set scaling=current"
        )
