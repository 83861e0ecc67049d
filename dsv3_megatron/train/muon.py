"""From this rank's shares of the weights to Muon: which boxes of which matrices each rank of a stage holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsv3_megatron.checkpoint.shares import Share, shares_of
from dsv3_megatron.model.heads import heads_of
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim import spread
from dsv3_megatron.optim.exchange import Exchange
from dsv3_megatron.optim.matrices import Rule, matrices_in, rules
from dsv3_megatron.optim.muon import Piece, arithmetic
from dsv3_megatron.optim.optimizer import parts_of, run_of
from dsv3_megatron.optim.settings import OptimSettings


def let_muon_update(
    optimizer: MegatronOptimizer,
    chunks: dict[int, GPTModel],
    groups: ProcessGroupCollection,
    holders: tuple[dist.ProcessGroup, dist.ProcessGroup],
    model: ModelSettings,
    optim: OptimSettings,
    device: torch.device,
) -> None:
    """Let Muon update the matrices of these stages. Collective, before the first step.

    Args:
        optimizer: whose parts are ``MuonWithAdamW`` under ZeRO-1.
        holders: the ranks that hold the same dense parameters, and the same experts, or parts of the same ones.
    """
    table = rules(optim, heads_of(model))
    shares = {share.parameter: share for share in shares_of(chunks, optimizer, groups)}
    for part in parts_of(optimizer):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.params]
        if not parameters:  # a stage without experts; all ranks of a group hold the same stages
            continue
        experts = not getattr(parameters[0], "allreduce", True)  # megatron-core's mark of them
        group = holders[1] if experts else holders[0]
        shapes: dict[str, tuple[int, int]] = {}
        runs: list[Tensor] = []
        pieces: list[Piece] = []
        copies: set[int] = set()
        for parameter in parameters:
            share = shares[parameter]
            boxes = _boxes(share, table, shapes)
            if not boxes:
                continue
            run = run_of(part, parameter)
            assert run is not None, share.name
            runs.append(run)
            if not share.writes:
                copies.update(range(len(pieces), len(pieces) + len(boxes)))
            pieces += [Piece.of(held, run) for held in boxes]
        holding = spread.Holding(tuple(piece.box for piece in pieces), frozenset(copies))
        every = _gathered((shapes, holding), group)
        plan = spread.make_plan(
            {name: shape for each, _ in every for name, shape in each.items()}, [held for _, held in every]
        )
        exchange = Exchange(plan, group, arithmetic(optim.muon, device), device)
        part.optimizer.let_muon(runs, pieces, exchange, optim.muon)


# Shapes of matrices, and what a rank holds of them.
_Held = tuple[dict[str, tuple[int, int]], spread.Holding]


def _gathered(mine: _Held, group: dist.ProcessGroup) -> list[_Held]:
    """Return what every rank of a group holds. Collective."""
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, mine, group=group)
    return every


def _boxes(share: Share, table: tuple[Rule, ...], shapes: dict[str, tuple[int, int]]) -> list[spread.Held]:
    """Return the boxes of matrices that lie in a share, and add their shapes to ``shapes``. Either all of it or nothing
    is a part of matrices."""
    found = []
    for piece in share.pieces:
        box = spread.Piece(piece.start, piece.extent, piece.strides, piece.offset)
        for matrix in matrices_in(piece.key, piece.whole, table):
            for held in spread.boxes_of(matrix, box):
                shapes[matrix.name] = matrix.shape
                found.append(held)
    numbers = sum(held.box.numbers for held in found)
    assert numbers in (0, share.end - share.start), f"{share.name}: {numbers} of {share.end - share.start} numbers"
    return found
