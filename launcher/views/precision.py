"""show=precision: which tensor of every module of the model is in which format, read off the modules as built."""

from __future__ import annotations

import json
import warnings
from typing import Any

from dsv3_megatron.precision.on_te import deviations
from dsv3_megatron.precision.policy import module_class, policy
from dsv3_megatron.recipe import Recipe
from launcher.views.layers import collapsed, shape_of


def show_precision(recipe: Recipe, *, as_json: bool) -> str:
    """Return the policy of a recipe and the formats of every parameter's products, as text or JSON."""
    warnings.filterwarnings("ignore")
    rows, modules = policy(recipe.precision), formats_as_built(recipe)
    otherwise = deviations(recipe.precision.fp8) if recipe.precision.fp8 and recipe.backend != "torch" else []
    if as_json:
        return json.dumps({"policy": [vars(row) for row in rows], "on_te": otherwise, "modules": modules})
    lines = [f"precision={recipe.precision.name}: which tensor is in which format, tile, scale, rounding", ""]
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("tensor", "format", "tile", "scale")]
    lines += ["  " + "  ".join(f"{v:<{w}}" for v, w in zip(vars(row).values(), [*widths, 0])) for row in rows]
    lines += (
        ["", "where Transformer Engine does otherwise", "", *(f"  {line}" for line in otherwise)] if otherwise else []
    )
    lines += ["", "every module with parameters, as built (layers that agree are shown as a range)", ""]
    rows_of_modules = collapsed((m["name"], shape_of(m["shape"]), f"{m['class']}: {m['products']}") for m in modules)
    longest = max(len(name) for name, *_ in rows_of_modules)
    for name, layers, shape, products in rows_of_modules:
        lines.append(f"  {name:<{longest}}  {layers:<6} {shape:<18} {products}")
    return "\n".join(lines)


def formats_as_built(recipe: Recipe) -> list[dict[str, Any]]:
    """Return name, shape, class and format of the products of every parameter, from the modules themselves."""
    # torch and megatron-core: seconds, which a refused recipe need not wait for
    from dsv3_megatron.planning.whole_model import meta_model
    from dsv3_megatron.precision.products import Fp8Products

    found: list[dict[str, Any]] = []
    with meta_model(recipe) as model:
        for name, parameter in model.named_parameters():
            owner, kind = model.get_submodule(name.rsplit(".", 1)[0]), module_class(name)
            in_fp8 = isinstance(getattr(owner, "products", None), Fp8Products)
            high = "fp32" if kind == "router gate" else str(parameter.dtype).removeprefix("torch.")
            products = "fp8 x fp8: fprop, dgrad, wgrad" if in_fp8 else high
            found.append({"name": name, "shape": list(parameter.shape), "class": kind, "products": products})
    return found
