"""What a stage, or the whole model, consists of: how many of each part, and how many of those are frozen. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.model.freeze import MTP, frozen_layers
from dsv3_megatron.model.settings import ModelSettings


@dataclass(frozen=True)
class Composition:
    """How many of each part a stage has; layers of MTP modules are counted among the others.

    ``frozen_dense``, ``frozen_moe``: of the layers, those that are frozen as a whole.
    """

    dense: int
    moe: int
    mtp: int
    embeddings: int
    predictions: int
    frozen_dense: int = 0
    frozen_moe: int = 0


def composition(model: ModelSettings, layers: tuple[int, ...], stage: int) -> Composition:
    """Return what stage ``stage`` consists of. The last has an embedding of its own where MTP needs one."""
    first, last = sum(layers[:stage]), stage == len(layers) - 1
    dense = max(0, min(first + layers[stage], model.first_k_dense_replace) - first)
    moe, depths = layers[stage] - dense, model.num_nextn_predict_layers if last else 0
    whole = frozen_as_a_whole(model, layers, stage)
    frozen_dense, frozen_moe = sum(whole[:dense]), sum(whole[dense : layers[stage]])
    if model.num_moe_layers:
        moe, frozen_moe = moe + depths, frozen_moe + sum(whole[layers[stage] :])
    else:
        dense, frozen_dense = dense + depths, frozen_dense + sum(whole[layers[stage] :])
    # A stage that is both first and last has one embedding for all.
    embeddings = int(stage == 0) + int(depths > 0 and stage > 0)
    return Composition(dense, moe, depths, embeddings, 1 + depths if last else 0, frozen_dense, frozen_moe)


def frozen_as_a_whole(model: ModelSettings, layers: tuple[int, ...], stage: int) -> tuple[bool, ...]:
    """Return of every layer of a stage, those of MTP modules last, whether it is frozen as a whole."""
    first, numbers = sum(layers[:stage]), frozen_layers(model.freeze)
    depths = model.num_nextn_predict_layers if stage == len(layers) - 1 else 0
    mine = (first + number in numbers for number in range(layers[stage]))
    return (*mine, *(MTP in model.freeze for _ in range(depths)))
