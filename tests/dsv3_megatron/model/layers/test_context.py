"""Exchanging pieces of the sequence for heads on four ranks: what is where, and that gradients go the same way back."""

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.model.layers.context import to_heads, to_pieces
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks

SEQUENCE, BATCH, WIDTH = 16, 2, 3


def whole(heads):
    return torch.arange(SEQUENCE * BATCH * heads * WIDTH, dtype=torch.float64).view(SEQUENCE, BATCH, heads, WIDTH)


def pieces_of(x, rank, size):
    pieces = x.chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def exchanged(heads):
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=100)
    try:
        mine = pieces_of(whole(heads), world.rank, world.size).requires_grad_()
        over_heads = to_heads(mine, dist.group.WORLD)
        # Each rank weighs what it holds by 1 + its rank: the gradient shows which rank a number went to.
        (over_heads * (1 + world.rank)).sum().backward()
        outside = over_heads.detach().requires_grad_()
        back = to_pieces(outside, dist.group.WORLD)
        (back * (1 + world.rank)).sum().backward()
        return tuple(x.tolist() for x in (mine.detach(), over_heads.detach(), mine.grad, back.detach(), outside.grad))
    finally:
        stop_processes()


@pytest.mark.parametrize("heads", [4, 8])
def test_every_rank_gets_the_sequence_in_order_with_its_heads_and_gives_it_back(heads):
    ((*ranks,),) = run_ranks(4, exchanged, [heads])
    share = heads // 4
    for rank, found in enumerate(ranks):
        mine, over_heads, gradient, back, outside_gradient = map(torch.tensor, found)
        assert over_heads.equal(whole(heads)[:, :, rank * share : (rank + 1) * share])
        assert back.equal(mine)
        by_head = torch.arange(heads) // share + 1  # the rank that had the head, and one
        assert gradient.equal(by_head.view(1, 1, -1, 1).expand_as(gradient).to(gradient))
        by_place = torch.cat([torch.full((2,), 1.0 + r) for r in (0, 1, 2, 3, 3, 2, 1, 0)])  # and that had the place
        assert outside_gradient.equal(by_place.view(-1, 1, 1, 1).expand_as(outside_gradient))
