"""The optimizer's states as checkpoints see them: float32 weights (masters), moments or momentum, count of updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.checkpoint.shares import Share
from dsv3_megatron.optim.muon import MOMENTUM
from dsv3_megatron.optim.optimizer import parts_of, run_of
from dsv3_megatron.pipeline.saved import Entry

MASTER = "param"  # megatron-core's name of it in checkpoints
_HELD_AS_THEY_ARE = (torch.float32, torch.bfloat16)  # Transformer Engine scales the others


def prepare_moments(optimizer: MegatronOptimizer) -> None:
    """Give Adam its moments where no step was taken yet: a checkpoint of step 0 holds zeros.

    megatron-core's own (``init_state_fn``) forgets an argument that TE's Adam wants (0.16.1 over TE 2.20.2).
    """
    for part in parts_of(optimizer):
        adam = part.optimizer
        if adam.state:
            continue
        if not hasattr(adam, "initialize_state"):
            part.init_state_fn(adam, part.config)
            continue
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.initialize_state(parameter, part.config.store_param_remainders)


def states_of(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, dict[str, Tensor]]:
    """Return the states of every parameter that this rank has a run of: ``param`` (the master), and
    ``exp_avg`` and ``exp_avg_sq``, or ``momentum_buffer``; each [numbers of the run], as they are held. Call after
    :func:`prepare_moments`."""
    found = {}
    for part in parts_of(optimizer):
        adam = part.optimizer
        for parameter in part.model_param_group_index_map:
            held = run_of(part, parameter)
            assert held is not None
            states = {name: value for name, value in adam.state[held].items() if isinstance(value, Tensor)}
            states = {MASTER: states.pop("master_param", held), **states}
            for name, value in states.items():
                assert value.dtype in _HELD_AS_THEY_ARE and value.is_contiguous(), (name, value.dtype)
            found[parameter] = {name: value.detach().view(-1) for name, value in states.items()}
    return found


def entry_prefix(state: str) -> str:
    """Return what checkpoints put before a parameter's name for one of its states."""
    return f"optimizer.state.{state}."


def moment_entries(share: Share, states: dict[str, Tensor]) -> list[Entry]:
    """Return the entries of what the optimizer keeps of a share's gradients."""
    moments = {name: state for name, state in states.items() if name != MASTER}
    return [entry for name, state in moments.items() for entry in share.entries(state, entry_prefix(name))]


def forget_moments(states: dict[str, Tensor]) -> None:
    """Let the optimizer begin with zeros in place of what it keeps of past gradients."""
    for name, state in states.items():
        if name != MASTER:
            state.zero_()


def other_moments(kept: dict[Share, dict[str, Tensor]]) -> set[str]:
    """Return the keys of what a checkpoint holds of these shares if another optimizer has updated them: AdamW's two
    moments, or Muon's momentum."""
    return {key for share, states in kept.items() for key in _keys_of_another(share, states)}


def updated_by_another(index: Metadata, kept: dict[Share, dict[str, Tensor]]) -> list[Share]:
    """Return the shares whose moments in a checkpoint are another optimizer's."""
    return [
        share for share, states in kept.items() if _keys_of_another(share, states) & index.state_dict_metadata.keys()
    ]


def _keys_of_another(share: Share, states: dict[str, Tensor]) -> set[str]:
    others = ("exp_avg", "exp_avg_sq") if MOMENTUM in states else (MOMENTUM,)
    return {entry_prefix(name) + piece.key for name in others for piece in share.pieces}


def updates_of(optimizer: MegatronOptimizer) -> int:
    """Return how often the weights were updated, which Adam's correction of its moments depends on."""
    return max(int(group.get("step", 0)) for part in parts_of(optimizer) for group in part.optimizer.param_groups)


def set_updates(optimizer: MegatronOptimizer, updates: int) -> None:
    """Let Adam count on from ``updates``; all other options stay the recipe's."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = updates


@torch.no_grad()
def weights_from_masters(optimizer: MegatronOptimizer, ddps: Iterable[DistributedDataParallel]) -> None:
    """Make the weights what the masters are in their format, as the end of a step does. Collective.

    For a checkpoint of a run in the same format that changes nothing. One whose weights were held in FP8 stores what
    is left of them, exactly so only where scales are powers of two: a run that resumes reads the masters.
    """
    for part in parts_of(optimizer):
        if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            part._copy_main_params_to_model_params()
            continue
        for weight in (weight for group in part.param_groups for weight in group["params"]):
            weight.data.copy_(part.optimizer.get_unscaled_state(weight, "master_param"))
    gather_weights(ddps)


def gather_weights(ddps: Iterable[DistributedDataParallel]) -> None:
    """Gather every parameter from the ranks that hold its runs. Collective."""
    for ddp in ddps:
        ddp.start_param_sync(force_sync=True)
