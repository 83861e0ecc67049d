"""What a checkpoint holds of a rank: model and router biases, optimizer, named extra states, random generators.

Tensors are described as megatron-core's sharded state, fully reshardable, so that any layout loads what any other
wrote. Random generators belong to a rank and are taken back in the same layout only; nothing in training draws from
them after the first weights (there is no dropout), so another layout loses nothing.

There is one format: the names, shapes and formats of the torch backend (``hugging_face.our_shapes``). A stage on
Transformer Engine gives its tensors those names itself (``model.specs.NAMES_IN_CHECKPOINTS``); the optimizer's states
and the average of the weights take theirs from it. Weights that TE holds in FP8 are stored as the numbers that they
stand for, and TE's pickled ``_extra_state`` is not stored at all: what of it has numbers, delayed scaling's amaxes, is
an extra state (``te_amaxes``).
"""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dsv3_megatron.pipeline.parts import Parts
from parallel.layout import Layout


def cutting(groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return how states are cut: fully reshardable."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }


def model_state(chunks: dict[int, GPTModel], groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the sharded state of this rank's stages: weights and router biases."""
    return {f"stage{stage}": _chunk_state(chunk, cutting(groups)) for stage, chunk in chunks.items()}


def _chunk_state(chunk: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's sharded state. An embedding of another stage on this rank is saved with that one."""
    borrowed = chunk.mtp_process and "embedding" not in dict(chunk.named_children())
    chunk.mtp_process, before = chunk.mtp_process and not borrowed, chunk.mtp_process
    try:
        state = chunk.sharded_state_dict(metadata=metadata)
    finally:
        chunk.mtp_process = before
    return {name: value for name, value in state.items() if not is_te_state(name)}


def is_te_state(name: str) -> bool:
    """Return whether an entry of a module's state is Transformer Engine's pickled state, by its name."""
    return name.rpartition(".")[2].startswith("_extra_state")


def _as_numbers(state: dict[str, Any]) -> None:
    """Replace weights held in FP8, in place, by the BF16 numbers that they stand for, in host memory.

    Those are exact where scales are powers of two. Where they are not, a run that resumes loses nothing either: it
    quantises its float32 masters anew.
    """
    for value in nested_values(state):
        if isinstance(value, ShardedBase) and is_float8tensor(value.data):
            value.data = value.data.dequantize().detach().cpu()


def whole_state(parts: Parts, *, loading: bool, extra: tuple[str, ...], optimizer: bool = True) -> dict[str, Any]:
    """Return the sharded state of this rank: model, optimizer, and the extra states named."""
    state: dict[str, Any] = {"model": model_state(parts.chunks, parts.groups)}
    if optimizer:
        metadata = cutting(parts.groups)
        state["optimizer"] = parts.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    if not loading:  # loading does it by itself; the optimizer has found its weights by now
        _as_numbers(state["model"])
    if extra:
        metadata = cutting(parts.groups)
        state["extra"] = {n: parts.extra_states[n].sharded_state(metadata, loading=loading) for n in extra}
    return state


def prepare_moments(optimizer: MegatronOptimizer) -> None:
    """Give Adam its moments where no step was taken yet: a checkpoint of step 0 holds zeros.

    megatron-core's own (``init_state_fn``) forgets an argument that TE's Adam wants (0.16.1 over TE 2.20.2).
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if adam.state:
            continue
        if not hasattr(adam, "initialize_state"):
            part.init_state_fn(adam, part.config)
            continue
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.initialize_state(parameter, part.config.store_param_remainders)


# -- random generators -------------------------------------------------------------------------------------------------


def gather_random_states(layout: Layout, device: torch.device) -> bytes | None:
    """Return all ranks' generators as a file on rank 0, None elsewhere. ``device``: the run's. Collective."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_random_state(device), states)
    if states is None:
        return None
    file = io.BytesIO()
    torch.save({"layout": asdict(layout), "ranks": states}, file)
    return file.getvalue()


def restore_random_state(file: bytes, layout: Layout, device: torch.device) -> bool:
    """Set this rank's generators from the file; return False, and leave them, where it is of another layout or of
    another kind of device, whose generators have another state."""
    stored = torch.load(io.BytesIO(file), weights_only=True)
    if stored["layout"] != asdict(layout):
        return False
    state = stored["ranks"][dist.get_rank()]
    if (state["cuda"] is not None) != (device.type == "cuda"):
        return False
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    if state["tracker"]:
        get_cuda_rng_tracker().set_states(state["tracker"])
    return True


def _random_state(device: torch.device) -> dict[str, Any]:
    tracked = {k: v for k, v in get_cuda_rng_tracker().get_states().items() if isinstance(v, torch.Tensor)}
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "tracker": {name: state.clone() for name, state in tracked.items()},
    }
