"""The experts' weight gradients by one kernel: beside float64, beside one product an expert; it compiles for a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.precision import weight_gradients
from testing.triton.compiler import HOPPER, compiled
from testing.triton.interpreter import interpreted

COUNTS = ([70, 0, 1, 129, 64], [0, 0, 0], [300], [0, 5], [128, 64, 192, 0])


def operands(counts, out, inner, dtype, seed=0):
    """Return total, grad, x and ends; what belongs to no expert is NaN."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    total = torch.randn(len(counts), out, inner, generator=draw)
    grad, x = (torch.randn(tokens + 3, width, generator=draw).to(dtype) for width in (out, inner))
    grad[tokens:] = x[tokens:] = float("nan")
    return total, grad, x, torch.tensor(counts).cumsum(0).to(torch.int32)


def added(case):
    """Return the total that the kernel makes, twice over, and the total before."""
    from dsv3_megatron.precision.kernels.weight_gradient import add_grouped

    counts, out, inner, dtype, by_column = case
    total, grad, x, ends = operands(counts, out, inner, dtype)
    if by_column:  # callers hand on transposed tensors
        grad = grad.t().contiguous().t()
    made = []
    for _ in range(2):
        made.append(total.clone())
        add_grouped(made[-1], grad, x, ends)
    return [m.numpy() for m in made], total.numpy()


CASES = [
    *((counts, 150, 200, torch.float16, False) for counts in COUNTS),
    (COUNTS[0], 128, 128, torch.float32, True),
    (COUNTS[0], 1100, 24, torch.float16, False),  # more than one band of tiles
]


@pytest.fixture(scope="module")
def made():
    return interpreted(added, CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_experts_product_is_added(made, number):
    counts, out, inner, dtype, _ = CASES[number]
    (found, again), before = made[number]
    _, grad, x, ends = operands(counts, out, inner, dtype)
    first = 0
    for expert, last in enumerate(ends.tolist()):
        wanted = before[expert].astype(np.float64)
        wanted += (grad[first:last].double().t() @ x[first:last].double()).numpy()
        np.testing.assert_allclose(found[expert], wanted, rtol=2e-5, atol=2e-4)
        if first == last:
            np.testing.assert_array_equal(found[expert], before[expert])
        first = last
    np.testing.assert_array_equal(found, again)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 20))
def test_the_loop_over_experts_adds_the_same(counts, out, inner):
    total, grad, x, ends = operands(counts, out, inner, torch.float32)
    tokens = sum(counts)
    wanted = total.double()
    for expert, (a, b) in enumerate(zip(grad[:tokens].split(counts), x[:tokens].split(counts), strict=True)):
        wanted[expert] += a.double().t() @ b.double()
    weight_gradients.add_grouped_product(total, grad[:tokens], x[:tokens], counts, ends)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_it_compiles_to_hoppers_own_products():
    types = {name: "i32" for name in ("out", "inner", "of_expert", "of_row", "of_grad", "of_x")}
    types |= {"total": "*fp32", "grad": "*bf16", "x": "*bf16", "ends": "*i32"}
    constants = {"OUT": 128, "IN": 128, "ROWS": 64, "TOGETHER": 8}
    module = "dsv3_megatron.precision.kernels.weight_gradient"
    [(text, shared)] = compiled([(module, "_kernel", types | constants, {"num_warps": 8, "num_stages": 4})])
    assert "wgmma.mma_async" in text and "cp.async" in text
    assert shared <= HOPPER[1]
