"""The kernel for all experts' weight gradients, by Triton's interpreter, beside float64 products; and its compilation.

The interpreter must be chosen before triton is imported, so it has a process of its own. It has no BF16 products (it
multiplies the bits), so float16 stands for it there: the kernel's text is the same.
"""

import os
import subprocess
import sys

import pytest

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
        assert count or torch.equal(found[expert], total[expert])


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
    import torch

    total, grad, x = torch.zeros(2, 4, 6), torch.zeros(5, 4).bfloat16(), torch.zeros(5, 6).bfloat16()
    ends = torch.tensor([2, 5], dtype=torch.int32)
    for wrong in ((total, grad[:4], x, ends), (total, grad, x, ends[:1]), (total, grad.float(), x.float(), ends),
                  (total, grad, x, ends.long()), (total.mT.contiguous().mT, grad, x, ends)):  # fmt: skip
        with pytest.raises(ValueError):
            kernels.add_weight_gradients(*wrong)
