"""The first weights: every parameter drawn from a generator of its own, so that they do not depend on the layout.

A parameter's generator is seeded by the run's seed and the parameter's name in the whole model; an expert's also by
its number. A rank that holds a share of it draws the whole and keeps its share. One process and 2,048 ranks therefore
start from the same model, and a change of layout is no change of experiment.
Source of the distribution: arXiv 2412.19437 section 4.2 (standard deviation 0.006); norm gains are ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsv3_megatron.model.stage import global_name, is_routed_expert

_GATE_UP = re.compile(r"(mlp|shared_experts|experts)\.linear_fc1\.weight\d*$")
_ONE_OF_EXPERTS = re.compile(r"\.weight(\d+)$")


@torch.no_grad()
def initialise(
    module: torch.nn.Module, *, first_layer: int, std: float, seed: int, groups: ProcessGroupCollection
) -> None:
    """Draw the weights of a stage whose first decoder layer is number ``first_layer`` (from 0) of the model."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        experts = module.config.num_moe_experts
        local = experts // groups.ep.size() if experts else 0
        for key, share, group, dim in _matrices(global_name(name, first_layer), parameter, groups, local):
            _draw(share, key, std=std, seed=seed, group=group, dim=dim, gated=bool(_GATE_UP.search(name)))


def _matrices(
    name: str, parameter: Tensor, groups: ProcessGroupCollection, local_experts: int
) -> Iterator[tuple[str, Tensor, torch.distributed.ProcessGroup, int | None]]:
    """Yield (key, matrix, TP group, sharded dimension or None) of a parameter; experts one by one.

    The torch backend holds a rank's experts stacked, Transformer Engine as ``weight0``, ``weight1`` ...: the keys are
    the same, and so are the weights. TE marks every weight as sharded, also those that every TP rank holds whole;
    those are the ones whose gradients megatron-core sums over TP.
    """
    if not is_routed_expert(name):
        sharded = getattr(parameter, "tensor_model_parallel", False) and not getattr(
            parameter, "sequence_parallel", False
        )
        yield name, parameter, groups.tp, parameter.partition_dim if sharded else None
        return
    dim = 0 if "linear_fc1" in name else 1
    first = groups.ep.rank() * local_experts
    if one := _ONE_OF_EXPERTS.search(name):
        key = f"{name[: one.start()]}.weight.{first + int(one[1])}"
        yield key, parameter, groups.expt_tp, dim
        return
    for index, matrix in enumerate(parameter.unbind()):
        yield f"{name}.{first + index}", matrix, groups.expt_tp, dim


def _draw(
    share: Tensor,
    key: str,
    *,
    std: float,
    seed: int,
    group: torch.distributed.ProcessGroup,
    dim: int | None,
    gated: bool,
) -> None:
    """Fill a rank's share [o, i] of the matrix called ``key``."""
    size, rank = (1, 0) if dim is None else (group.size(), group.rank())
    shape = list(share.shape)
    if dim is not None:
        shape[dim] *= size
    whole = _whole(shape, key, std=std, seed=seed, device=share.device)
    if dim is None or size == 1:
        mine = whole
    elif gated:  # gate and up are each sharded: a rank holds [gate share; up share]
        mine = torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
    else:
        mine = whole.chunk(size, dim)[rank]
    if is_float8tensor(share):
        mine = mine.to(share.dtype)  # what the weight would be if it were not held in FP8
        _keep_for_masters(share, mine)
    share.copy_(mine)


def _whole(shape: list[int], key: str, *, std: float, seed: int, device: torch.device) -> Tensor:
    """Return the whole matrix called ``key``, float32. A GPU's generator gives other numbers than a CPU's."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)


def _keep_for_masters(weight: Tensor, drawn: Tensor) -> None:
    """Let the optimizer's float32 masters begin with what was drawn, not with what FP8 left of it.

    megatron-core's optimizer asks a weight that is held in FP8 for these two functions, which TE gives weights that it
    draws itself.
    """
    kept = [drawn.cpu()]
    weight.get_high_precision_init_val = lambda: kept[0]
    weight.clear_high_precision_init_val = kept.clear


def forget_drawn(module: torch.nn.Module) -> None:
    """Free what was kept for masters. The optimizer does it for the weights of its own shard only."""
    for parameter in module.parameters():
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()
