"""SwiGLU with its cast by kernels, interpreted: the eager code's numbers, and the emulation's cache bit for bit."""

import pytest
import torch

from dsv3_megatron.model.layers import swiglu as eager
from dsv3_megatron.precision.tiles import quantise
from testing.triton.compiler import SHARED_MEMORY, compiled
from testing.triton.interpreter import interpreted

MODULE = "dsv3_megatron.precision.kernels.swiglu"
# The share of numbers that may differ in the last bit, and what that is: exponentials are another library's. BF16 is
# not here: the interpreter cuts off where a GPU rounds to it (3.9), and ``make gpu-check`` compares it.
APART = {torch.float16: (1e-2, 2e-3), torch.float32: (0.5, 1e-6)}
CASES = [
    (dtype, shape, weighted)
    for dtype in APART
    for shape in ((37, 256), (1, 128), (3, 5, 128), (0, 128))
    for weighted in (True, False)
]


def operands(dtype, shape, weighted):
    """Return input, weights and the output's gradient."""
    draw = torch.Generator().manual_seed(3)
    gate_up = (3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=draw)).to(dtype)
    probs = torch.rand(*shape[:-1], 3, generator=draw)[..., 1:2] if weighted else None  # a column of a wider tensor
    return gate_up, probs, torch.randn(shape, generator=draw).to(dtype)


def by_kernels(case):
    """Return what the kernels make of a case."""
    from dsv3_megatron.precision.kernels import swiglu as kernels

    gate_up, probs, grad = operands(*case)
    out, cache = kernels.activate(gate_up, probs, cached=True)
    uncached, nothing = kernels.activate(gate_up.mT.contiguous().mT, probs, cached=False)
    assert nothing is None and torch.equal(out, uncached)
    found = {
        "out": out,
        "cache": cache[0].view(torch.uint8),
        "scales": cache[1],
        "again": kernels.activate_again(cache, probs, gate_up.dtype),
        "from cache": kernels.gradients(grad, None, cache, probs),
        "from input": kernels.gradients(grad, gate_up, None, probs),
    }
    return {
        name: [None if t is None else t.float().numpy() for t in (value if isinstance(value, tuple) else (value,))]
        for name, value in found.items()
    }


@pytest.fixture(scope="module")
def made():
    return interpreted(by_kernels, CASES)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_result_is_the_eager_codes(made, number):
    dtype, shape, weighted = CASES[number]
    gate_up, probs, grad = operands(dtype, shape, weighted)
    cache = eager._Cache(quantise(gate_up, (1, 128)), probs, dtype)
    wanted = {
        "out": [eager.swiglu(gate_up, probs)],
        "cache": [cache.gate_up.data.view(torch.uint8)],
        "scales": [cache.gate_up.scale_inv],
        "again": [cache.output()],
        "from cache": eager._gradients(grad, cache.input(), probs),
        "from input": eager._gradients(grad, gate_up, probs),
    }
    for name, values in wanted.items():
        for which, (value, found) in enumerate(zip(values, made[number][name], strict=True)):
            if value is None:
                assert found is None
                continue
            found = torch.from_numpy(found)
            assert found.shape == value.shape
            if name in ("cache", "scales"):
                assert torch.equal(found, value.float())
            elif name.startswith("from") and which == 1:  # sums over the width, in another order
                torch.testing.assert_close(found, value.float(), rtol=1e-4, atol=1e-4)
            else:
                share, last_bit = APART[dtype]
                torch.testing.assert_close(found, value.float(), rtol=last_bit, atol=1e-6)
                assert found.numel() == 0 or (found != value.float()).float().mean() <= share


def taken_with_too_few_probs(case):
    """Return what is computed with fewer probs than tokens, which would read and write past their memory."""
    from dsv3_megatron.precision.kernels import swiglu as kernels

    gate_up, probs, grad = operands(*case)
    cache = kernels.activate(gate_up, None, cached=True)[1]
    taken = []
    for name, run in {
        "out": lambda: kernels.activate(gate_up, probs[:1], cached=False),
        "again": lambda: kernels.activate_again(cache, probs[:1], gate_up.dtype),
        "from cache": lambda: kernels.gradients(grad, None, cache, probs[:1]),
        "from input": lambda: kernels.gradients(grad, gate_up, None, probs[:1]),
    }.items():
        try:
            run()
            taken.append(name)
        except ValueError:
            pass
    return taken


def test_probs_for_other_tokens_are_refused():
    assert interpreted(taken_with_too_few_probs, [(torch.float32, (37, 256), True)]) == [[]]


def test_they_compile_for_a_gpu():
    shape = {"tokens": "i32", "inner": "i32", "TOKENS": 16, "TILE": 128, "WEIGHTED": True, "probs": "*fp32"}
    cache = {"data": "*u8", "scale_inv": "*fp32"}
    most = torch.finfo(torch.bfloat16).max
    rows = {"rows": "*bf16", "of_row": "i32", "out": "*bf16"}
    grads = {"grads": "*bf16", "of_grad": "i32", "of_row": "i32", "to_input": "*bf16", "to_probs": "*fp32"}
    made = compiled([
        (MODULE, "_activate", rows | cache | shape | {"MOST": most, "CACHED": True}, {}),
        (MODULE, "_activate_again", cache | {"out": "*bf16"} | shape, {}),
        (MODULE, "_gradients", grads | {"source": "*u8", "scale_inv": "*fp32"} | shape | {"CACHED": True}, {}),
    ])  # fmt: skip
    assert all(shared <= SHARED_MEMORY and "ld.global" in text for text, shared in made)
