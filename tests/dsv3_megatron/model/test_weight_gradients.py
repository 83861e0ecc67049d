"""Gradients of BF16 weights: sums over microbatches of float32 products, never rounded to BF16 on the way."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from dsv3_megatron.model.layers.embedding import VocabParallelEmbedding
from dsv3_megatron.model.layers.experts import GroupedLinear
from dsv3_megatron.model.layers.norm import RMSNorm
from dsv3_megatron.precision.weight_gradients import accumulate, add_grouped_product, add_product, embedding
from dsv3_megatron.routing.router import SequenceBalancedRouter
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import run_pipeline
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe, step_batches_of

PAIR = ("parallel.pipeline=2", "optim.micro_batch=1")
LAYOUTS = {
    1: [()],
    2: [
        (*PAIR, "parallel.schedule=1f1b"),
        (*PAIR, "parallel.schedule=zb1p"),
        (*PAIR, "parallel.schedule=dualpipe"),
    ],
}


def float32_gradient(module, x, dy, rows):
    """Return the gradient of a module's weight from one call, from its input and its output's gradient."""
    x, dy = (t.detach().flatten(0, -2).float() if t.is_floating_point() else t for t in (x, dy))
    if isinstance(module, GroupedLinear):
        return torch.stack([a.t() @ b for a, b in zip(dy.split(rows), x.split(rows))])
    if isinstance(module, RMSNorm):
        return (dy * F.rms_norm(x, x.shape[-1:], None, module.eps)).sum(0)
    if isinstance(module, VocabParallelEmbedding):
        return torch.zeros(module.weight.shape).index_add_(0, x.flatten(), dy)
    return dy.t() @ x


def largest_errors(overrides):
    """Run one step's microbatches; return by parameter how far the buffer is from the float32 sum, and how far the sum
    of gradients rounded to BF16 would be."""
    torch.set_num_threads(1)
    recipe, world = small_recipe("precision=bf16", *overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        exact, rounded = defaultdict(float), defaultdict(float)

        def watch(module):
            def after(_, inputs, output):
                out = output[0] if isinstance(output, tuple) else output
                if not torch.is_grad_enabled():
                    return
                x, rows = inputs[0].detach(), list(inputs[1]) if isinstance(module, GroupedLinear) else None

                def note(dy):
                    one = float32_gradient(module, x, dy, rows)
                    exact[module.weight] = exact[module.weight] + one
                    rounded[module.weight] = rounded[module.weight] + one.bfloat16().float()

                out.register_hook(note)

            if isinstance(module, SequenceBalancedRouter):
                gating = module.gating
                module.gating = lambda x: (logits := gating(x), after(module, (x,), logits))[0]
            else:
                module.register_forward_hook(after)

        for chunk in parts.chunks.values():
            for module in chunk.modules():
                if getattr(module, "weight", None) is not None:
                    watch(module)
        for ddp in parts.ddps.values():
            ddp.zero_grad_buffer()
        for ddp in parts.ddps.values():
            ddp.start_grad_sync = lambda *unused: None  # each rank's own sums
        run_pipeline(parts, step_batches_of(parts), training=True)
        found = {}
        for stage, chunk in parts.chunks.items():
            for name, parameter in chunk.named_parameters():
                sums = exact[parameter], parameter.main_grad, rounded[parameter]
                norm = sums[0].norm()
                found[f"{stage}.{name}"] = [((s - sums[0]).norm() / norm).item() for s in sums[1:]]
        return found
    finally:
        stop_processes()


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_gradient_is_the_float32_sum_over_microbatches(ranks):
    for layout, results in zip(LAYOUTS[ranks], run_ranks(ranks, largest_errors, LAYOUTS[ranks])):
        for found in results:
            worst = max(found, key=lambda name: found[name][0])
            assert found[worst][0] < 2e-6, (layout, worst, found[worst])
            seen = [rounded for name, (_, rounded) in found.items() if "embedding" not in name]
            assert min(seen) > 1e-4, "rounding to BF16 would be seen"


@pytest.mark.parametrize("dtype, expected", [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_without_a_buffer_the_gradient_is_rounded_once_into_grad(dtype, expected):
    weight, dtypes = torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype)), []
    for _ in range(2):
        accumulate(weight, lambda total: dtypes.append(total.dtype) or total.add_(1.5))
    assert weight.grad.dtype == dtype and torch.equal(weight.grad, torch.full_like(weight, 3.0))
    assert dtypes == [expected] * 2


def test_products_of_bf16_are_added_as_float32():
    torch.manual_seed(0)
    left, right = torch.randn(9, 70).bfloat16(), torch.randn(70, 5).bfloat16()
    total = torch.ones(9, 5)
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), 1 + left.double() @ right.double(), rtol=1e-6, atol=1e-5)
    grouped = torch.ones(3, 9, 5)
    add_grouped_product(grouped, left.t(), right, [40, 0, 30])
    assert torch.equal(grouped[1], torch.ones(9, 5))
    torch.testing.assert_close(grouped[0] + grouped[2] - 1, total, rtol=1e-6, atol=1e-5)


def test_a_token_that_comes_often_is_not_rounded_away():
    weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(4, 2)
    embedding(torch.full((1000,), 3), weight).sum().backward()  # BF16 alone would stop at 256
    assert weight.grad is None and weight.main_grad[3].tolist() == [1000.0, 1000.0]
