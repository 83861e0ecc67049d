"""What a stage consists of and what it holds: the common words of the exact path and of the formulae. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.model.settings import ModelSettings


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one rank. All but the parameter counts are above the level without this microbatch.

    ``kept`` lives from the forward to the last gradient; ``kept_deferred`` from an input gradient to its weight
    gradient; ``held`` is there once, whatever the number of microbatches. The peaks are the most that is alive inside a
    pass, what is kept included; ``peak_backward`` is that of a backward overlapped with a forward, less what the
    forward keeps, where the schedule overlaps.
    """

    parameters: int
    expert_parameters: int
    fp8_parameters: int
    kept: int
    held: int
    kept_deferred: int
    peak_forward: int
    peak_backward: int
    peak_weight_grad: int
    message: int


@dataclass(frozen=True)
class Composition:
    """How many of each part a stage has; layers of MTP modules are counted among the others."""

    dense: int
    moe: int
    mtp: int
    embeddings: int
    predictions: int


def composition(model: ModelSettings, layers: tuple[int, ...], stage: int) -> Composition:
    """Return what stage ``stage`` consists of. The last has an embedding of its own where MTP needs one."""
    first, last = sum(layers[:stage]), stage == len(layers) - 1
    dense = max(0, min(first + layers[stage], model.first_k_dense_replace) - first)
    moe, depths = layers[stage] - dense, model.num_nextn_predict_layers if last else 0
    if model.num_moe_layers:
        moe += depths
    else:
        dense += depths
    # A stage that is both first and last has one embedding for all.
    embeddings = int(stage == 0) + int(depths > 0 and stage > 0)
    return Composition(dense, moe, depths, embeddings, 1 + depths if last else 0)
