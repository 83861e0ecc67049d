"""How the model's layers are spread over pipeline stages. No torch: asked before anything starts."""

from __future__ import annotations

from dsv3_megatron.model.costs import multiplied_parameters
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.recipe import Recipe
from parallel.pipeline.actions import Placement


def layers_of_stages(recipe: Recipe) -> tuple[int, ...]:
    """Return the decoder layers of each stage: as the recipe says, or balanced."""
    return recipe.parallel.stages or balanced_stages(recipe.model, recipe.placement(), recipe.data.sequence_length)


def balanced_stages(model: ModelSettings, placement: Placement, sequence_length: int = 0) -> tuple[int, ...]:
    """Return how many decoder layers each stage gets so that the costliest rank is as cheap as possible.

    What is balanced is the sum over the stages a rank holds: under DualPipe a rank works on two, r and P - 1 - r.
    Counts what a token multiplies, attention over the sequence included: a layer, the output head (last stage), an
    MTP module with its share of the head (last stage). Of equally good splits the one whose leading stages are fuller
    is taken.
    """
    cost = multiplied_parameters(model, sequence_length)
    tail = cost.head + model.num_nextn_predict_layers * (cost.mtp_module + cost.head)
    layer, stages = cost.layer or 1, placement.stages
    held = [placement.stages_of(rank) for rank in range(placement.ranks)]
    layers = [1] * stages
    assert model.num_hidden_layers >= stages

    def of_stage(stage: int) -> int:
        return layers[stage] * layer + (tail if stage == stages - 1 else 0)

    def of_rank(stage: int) -> int:
        return max(sum(map(of_stage, on_rank)) for on_rank in held if stage in on_rank)

    for _ in range(model.num_hidden_layers - stages):
        layers[min(range(stages), key=lambda s: (of_rank(s), of_stage(s), s))] += 1
    return tuple(layers)
