"""The experts' weight gradients by one kernel: beside float64, beside one product an expert; it compiles for a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.precision import weight_gradients
from testing.triton.compiler import SHARED_MEMORY, compiled
from testing.triton.interpreter import interpreted

COUNTS = ([70, 0, 1, 129, 64], [0, 0, 0], [300], [0, 5], [128, 64, 192, 0])


def operands(counts, out, inner, dtype, seed=0):
    """Return total, grad, x and ends; what belongs to no expert is NaN."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(counts)
    total = torch.randn(len(counts), out, inner, generator=draw)
    grad, x = (torch.randn(tokens + 3, width, generator=draw).to(dtype) for width in (out, inner))
    grad[tokens:] = x[tokens:] = float("nan")
    total[[not count for count in counts]] = -0.0  # which adding nothing would make 0.0
    return total, grad, x, torch.tensor(counts).cumsum(0).to(torch.int32)


def added(case):
    """Return the total that the kernel makes, twice over, and the total before."""
    from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients

    counts, out, inner, dtype, by_column = case
    total, grad, x, ends = operands(counts, out, inner, dtype)
    if by_column:  # callers hand on transposed tensors
        grad = grad.t().contiguous().t()
    made = []
    for _ in range(2):
        made.append(total.clone())
        add_weight_gradients(made[-1], grad, x, ends)
    return [m.numpy() for m in made], total.numpy()


CASES = [
    *((counts, 150, 200, torch.float16, False) for counts in COUNTS),
    (COUNTS[0], 128, 128, torch.float16, True),
    (COUNTS[0], 40, 60, torch.float16, False),
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
            np.testing.assert_array_equal(found[expert].view(np.int32), before[expert].view(np.int32))
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


def poisoned(unused):
    """Return which experts' gradients are no number where one expert's rows are none, and one gradient was none."""
    from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients

    grad, x, total = torch.ones(75, 20).half(), torch.ones(75, 24).half(), torch.full((3, 20, 24), 2.0)
    grad[:5] = total[1] = float("nan")
    add_weight_gradients(total, grad, x, torch.tensor([5, 5, 75], dtype=torch.int32))
    return [bool(one.isnan().all()) for one in total], total[2].unique().tolist()


def test_no_number_of_an_expert_reaches_another():
    assert interpreted(poisoned, [None]) == [([True, True, False], [72.0])]


def test_what_does_not_fit_is_refused():
    assert interpreted(refused, [None]) == [["ValueError"] * 4]


def refused(unused):
    """Return what the kernel's caller raises for shapes, dtypes and memory that do not fit."""
    from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients

    total, grad, x, ends = operands([3, 4], 20, 30, torch.float16)
    raised = []
    for operands_given in (
        (total, grad[1:], x, ends),
        (total, grad, x, ends.long()),
        (total, grad.float(), x.float(), ends),
        (total.mT.contiguous().mT, grad, x, ends),
    ):
        try:
            add_weight_gradients(*operands_given)
        except ValueError as error:
            raised.append(type(error).__name__)
    return raised


def taken(case):
    """Return whether the kernel is asked, on a machine that says it has one, and what the total became without it."""
    from dsv3_megatron.precision.kernels import weight_gradient as kernels

    dtype, known, width = case
    calls = []
    weight_gradients.usable = lambda tensor: True
    kernels.add_weight_gradients = lambda *given: calls.append(given)
    total, grad, x = torch.zeros(2, width, width), torch.ones(5, width, dtype=dtype), torch.ones(5, width, dtype=dtype)
    ends = torch.tensor([2, 5], dtype=torch.int32) if known else None
    weight_gradients.add_grouped_product(total, grad, x, [2, 3], ends)
    same = [[one is other for one, other in zip(call, (total, grad, x, ends), strict=True)] for call in calls]
    return same, total.amax(dim=(1, 2)).tolist()


def test_the_kernel_is_taken_for_small_experts_in_bf16_whose_ends_the_device_knows():
    bf16, asked, plainly = torch.bfloat16, ([[True] * 4], [0.0, 0.0]), ([], [2.0, 3.0])
    cases = {(bf16, True, 8): asked, (bf16, False, 8): plainly, (torch.float32, True, 8): plainly,
             (bf16, True, 1024): plainly}  # fmt: skip
    assert interpreted(taken, list(cases)) == list(cases.values())


def of_fp8(unused):
    """Return whether FP8 operands reach the kernel in BF16 as the numbers they are, from a layer of two experts."""
    from dsv3_megatron.precision.kernels import weight_gradient as kernels
    from dsv3_megatron.precision.products import Fp8Products
    from dsv3_megatron.precision.settings import Fp8Settings

    calls = []
    weight_gradients.usable = lambda tensor: True
    kernels.add_weight_gradients = lambda *given: calls.append(given)
    Fp8Products._exact_in_bf16 = lambda products, operand: True  # as on a GPU
    torch.manual_seed(0)
    fp8, ends = Fp8Products(Fp8Settings()), torch.tensor([100, 300], dtype=torch.int32)
    x, weight, dy = torch.randn(300, 256), torch.randn(2, 128, 256), torch.randn(300, 128) * 1e-6
    kept = fp8.operand_for_weight_gradient(fp8.forward(x, weight, ends)[1], ends)
    _, kept_dy = fp8.input_gradient(dy, weight, ends)
    fp8.add_weight_gradient(torch.zeros_like(weight), kept_dy, kept, ends, [100, 200])
    ((_, left, right, found_ends),) = calls
    assert left.dtype == right.dtype == torch.bfloat16 and found_ends is ends
    return torch.equal(left.float(), kept_dy.dequantise()) and torch.equal(right.float(), kept.dequantise())


def test_fp8_operands_lose_nothing_in_bf16():
    assert interpreted(of_fp8, [None]) == [True]


def tilings(unused):
    """Return every way in which a gradient is cut, as a GPU would be told."""
    from dsv3_megatron.precision.kernels import weight_gradient as module

    shared = SHARED_MEMORY
    found = [module.tiling(o, i, memory) for o, i in ((512, 512), (64, 4096))
             for memory in (shared, 100 << 10)]  # fmt: skip
    return [(cut.o, cut.i, cut.tokens, cut.warps, cut.stages) for cut in found]


def test_it_compiles_to_hoppers_own_products():
    types = {"o_size": "i32", "i_size": "i32", "total": "*fp32", "grad": "*bf16", "x": "*bf16", "ends": "*i32"}
    module = "dsv3_megatron.precision.kernels.weight_gradient"
    [cuts] = interpreted(tilings, [None])
    kernels = [
        (module, "add_product_kernel", types | {"O_TILE": o, "I_TILE": i, "TOKENS": tokens, "GROUP": 8},
         {"num_warps": warps, "num_stages": stages})
        for o, i, tokens, warps, stages in cuts
    ]  # fmt: skip
    assert len(set(cuts)) == 3
    for text, shared in compiled(kernels):
        assert "wgmma.mma_async" in text and "cp.async" in text
        assert shared <= SHARED_MEMORY
