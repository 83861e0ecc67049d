"""What attention's backward is given in place of its output lies in memory as the output did."""

import pytest
import torch

from dsv3_megatron.model.layers import attention_cache
from dsv3_megatron.model.layers.attention_cache import OutputCache
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import VALUES, small_recipe, step_batches_of


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("width", [16, 24])  # of what attention gives: the last columns are padding
@pytest.mark.parametrize("layout", [(0, 2, 1, 3), (0, 1, 2, 3), (2, 0, 1, 3)])  # B, H, S, W in the order of memory
def test_an_output_comes_back_as_it_was(batch, width, layout):
    torch.manual_seed(0)
    order = [(batch, 4, 32, width)[axis] for axis in layout]
    out = torch.randn(order).permute([layout.index(axis) for axis in range(4)])
    out[..., 16:] = 0
    cache = OutputCache("once")
    with cache.watch():
        saved = torch.ones(1, requires_grad=True).expand_as(out) * out  # keeps out for its backward
    cache.keep(out, out[..., :16].permute(2, 0, 1, 3))
    back = next(t for t in (saved.grad_fn._saved_self, saved.grad_fn._saved_other) if t is not None)
    assert torch.equal(back, out)
    assert (back.shape, back.stride()) == (out.shape, out.stride())


def what_came_back(overrides):
    """Train a step; return (shape, strides) of every attention output as it was and as it came back."""
    found = []
    init, restore = attention_cache._Saved.__init__, attention_cache._Saved.restore

    def note(self, tensor):
        init(self, tensor)
        self.was = tuple(tensor.shape), tensor.stride()

    def compare(self):
        back = restore(self)
        if self.tensor is None:
            found.append((self.was, (tuple(back.shape), back.stride())))
        return back

    attention_cache._Saved.__init__, attention_cache._Saved.restore = note, compare
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        recipe = small_recipe(*overrides)
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        train_step(parts, step_batches_of(parts), VALUES)
    finally:
        stop_processes()
        attention_cache._Saved.__init__, attention_cache._Saved.restore = init, restore
    return found


def test_it_does_so_in_training_with_two_sequences_and_under_context_parallelism():
    fp8 = ("precision=fp8", "optim.micro_batch=2")
    for ranks, overrides in ((1, fp8), (2, (*fp8, "parallel.context=2"))):
        for found in run_ranks(ranks, what_came_back, [overrides])[0]:
            assert found, "no output was exchanged"
            for was, is_now in found:
                assert was[0][0] == 2 and is_now == was, (ranks, was, is_now)
