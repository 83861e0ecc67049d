"""The kernel for all experts' weight gradients, by Triton's interpreter, beside float64 products; and its compilation.

The interpreter must be chosen before triton is imported, so it has a process of its own. It has no BF16 products (it
multiplies the bits), so float16 stands for it there: the kernel's text is the same.
"""

import os
import subprocess
import sys

import numpy
import pytest
import torch
from packaging.version import Version

from dsv3_megatron.precision import weight_gradients
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3_megatron.precision.kernels import weight_gradient as kernels

INTERPRETED = """
import torch
from hypothesis import given, settings, strategies as st
from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients
from dsv3_megatron.precision.weight_gradients import add_grouped_product


def check(rows, o, i, seed):
    torch.manual_seed(seed)
    tokens = sum(rows)
    # The rows after the last expert's are nobody's.
    grad, x = (torch.randn(tokens + 3, width).half() for width in (o, i))
    grad[tokens:], x[tokens:] = torch.nan, torch.nan
    total = torch.randn(len(rows), o, i)
    total[[not count for count in rows]] = -0.0  # which adding nothing would make 0.0
    ends = torch.tensor(rows).cumsum(0).int()
    found, again, plain, exact = total.clone(), total.clone(), total.clone(), total.double()
    add_weight_gradients(found, grad, x, ends)
    add_weight_gradients(again, grad, x, ends)
    add_grouped_product(plain, grad[:tokens], x[:tokens], rows)
    for one, a, b in zip(exact, grad[:tokens].double().split(rows), x[:tokens].double().split(rows)):
        one.addmm_(a.t(), b)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, again)
    for expert, count in enumerate(rows):
        assert count or torch.equal(found[expert].view(torch.int32), total[expert].view(torch.int32))


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(1, 80), st.integers(1, 80), st.integers(0, 9))
def property(rows, o, i, seed):
    check(rows, o, i, seed)


def poisoned_neighbours():
    # What is no number among one expert's rows stays in that expert's gradient, and its unread rows do no harm.
    rows, (grad, x) = [5, 0, 70], (torch.ones(75, 20).half(), torch.ones(75, 24).half())
    grad[:5] = torch.nan
    total = torch.full((3, 20, 24), 2.0)
    total[1] = torch.nan
    add_weight_gradients(total, grad, x, torch.tensor(rows).cumsum(0).int())
    assert total[0].isnan().all() and total[1].isnan().all() and (total[2] == 72).all()


property()
check([130, 0, 3], 130, 140, 0)  # the next tiling, several tiles
check([0, 0], 8, 8, 0)
check([9, 70], 1100, 1030, 0)  # the widest, with a second row of groups
poisoned_neighbours()
print("all well")
"""


@pytest.mark.skipif(
    Version(numpy.__version__) >= Version("2.5") and Version(triton.__version__) < Version("3.9"),
    reason="the interpreter of Triton 3.6 makes numbers of arrays in a way that numpy 2.5 refuses",
)
def test_the_kernel_gives_every_expert_its_product():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("all well\n"), done.stdout + done.stderr


@pytest.mark.parametrize("cut", [kernels.WIDE, kernels.MIDDLE, kernels.NARROW])
def test_it_compiles_for_hopper_and_uses_its_tensor_cores(cut):
    names = {"total": "*fp32", "grad": "*bf16", "x": "*bf16", "ends": "*i32", "o_size": "i32", "i_size": "i32"}
    constants = {"O_TILE": cut.o, "I_TILE": cut.i, "TOKENS": cut.tokens, "GROUP": kernels.TILES_IN_GROUP}
    source = ASTSource(
        fn=kernels.add_product_kernel,
        signature=names | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(names))},
    )
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= kernels._HOPPER_SHARED_MEMORY


def test_a_smaller_gpu_gets_fewer_stages_or_smaller_tiles():
    assert kernels.tiling(4096, 7168) == kernels.WIDE
    assert kernels.tiling(4096, 7168, 99 * 1024).stages == 2
    assert kernels.tiling(4096, 7168, 64 * 1024).o == kernels.tiling(256, 512).o == 128
    assert kernels.tiling(100, 7168) == kernels.NARROW


def test_operands_that_do_not_fit_are_refused():
    total, grad, x = torch.zeros(2, 4, 6), torch.zeros(5, 4).bfloat16(), torch.zeros(5, 6).bfloat16()
    ends = torch.tensor([2, 5], dtype=torch.int32)
    for wrong in ((total, grad[:4], x, ends), (total, grad, x, ends[:1]), (total, grad.float(), x.float(), ends),
                  (total, grad, x, ends.long()), (total.mT.contiguous().mT, grad, x, ends)):  # fmt: skip
        with pytest.raises(ValueError):
            kernels.add_weight_gradients(*wrong)


@pytest.fixture
def asked(monkeypatch):
    """What the kernel is asked for, on a machine that says it has one."""
    calls = []
    monkeypatch.setattr(weight_gradients, "usable", lambda tensor: True)
    monkeypatch.setattr(kernels, "add_weight_gradients", lambda *operands: calls.append(operands))
    return calls


@pytest.mark.parametrize(("dtype", "known", "taken"), [
    (torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False),
])  # fmt: skip
def test_bf16_operands_go_to_the_kernel_where_the_device_knows_their_ends(asked, dtype, known, taken):
    total, grad, x = torch.zeros(2, 4, 6), torch.ones(5, 4, dtype=dtype), torch.ones(5, 6, dtype=dtype)
    ends = torch.tensor([2, 5], dtype=torch.int32) if known else None
    weight_gradients.add_grouped_product(total, grad, x, [2, 3], ends)
    assert [[one is other for one, other in zip(call, (total, grad, x, ends))] for call in asked] == [
        [True] * 4
    ] * taken
    assert torch.equal(total, torch.tensor([2.0, 3.0]).view(2, 1, 1).expand(2, 4, 6) * (not taken))


def test_fp8_operands_lose_nothing_in_bf16(asked, monkeypatch):
    monkeypatch.setattr(Fp8Products, "_exact_in_bf16", lambda products, operand: True)
    torch.manual_seed(0)
    fp8, ends = Fp8Products(Fp8Settings()), torch.tensor([100, 300], dtype=torch.int32)
    x, weight, dy = torch.randn(300, 256), torch.randn(2, 128, 256), torch.randn(300, 128) * 1e-6
    kept = fp8.operand_for_weight_gradient(fp8.forward(x, weight, ends)[1], ends)
    _, kept_dy = fp8.input_gradient(dy, weight, ends)
    fp8.add_weight_gradient(torch.zeros_like(weight), kept_dy, kept, ends, [100, 200])
    ((_, left, right, found_ends),) = asked
    assert left.dtype == right.dtype == torch.bfloat16 and found_ends is ends
    assert torch.equal(left.float(), kept_dy.dequantise()) and torch.equal(right.float(), kept.dequantise())
