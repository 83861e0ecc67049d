"""What a run is made of, in the words its start prints."""

from __future__ import annotations

from dsv3_megatron.model.costs import count_parameters
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.precision.kernels import available


def run_facts(parts: Parts) -> dict[str, str]:
    """Return name -> text of the lines at the start of a run."""
    recipe, layout = parts.recipe, parts.layout
    counted = count_parameters(recipe.model)
    mtp = f", MTP {counted.mtp:,} more" if counted.mtp else ""
    ranks = "rank" if layout.world_size == 1 else "ranks"
    backend = f"{parts.backend.name} on {parts.device.type}, {recipe.precision.name}"
    frozen = f"{counted.frozen:,} frozen ({', '.join(recipe.model.freeze)})"
    return {
        "run": recipe.run.directory,
        "model": f"{counted.main:,} parameters, {counted.activated_per_token:,} active per token{mtp}",
        **({"trained": f"{counted.trained:,} parameters, {frozen}"} if recipe.model.freeze else {}),
        "layout": f"{layout.world_size} {ranks}: {layout.describe()}; {_schedule(parts)}",
        "backend": "; ".join(filter(None, (backend, parts.adamw, parts.backend.attention, _kernels(parts)))),
    }


def _kernels(parts: Parts) -> str:
    """Return why a GPU goes without this project's own kernels; nothing where it does not."""
    why = available.why_not() if parts.device.type == "cuda" else None
    return f"without Triton's kernels: {why}" if why else ""


def _schedule(parts: Parts) -> str:
    if parts.layout.pp == 1 and len(parts.chunks) == 1:
        return "one stage"
    return f"{parts.recipe.parallel.schedule}, layers of stages {list(parts.layers_of_stages)}"
