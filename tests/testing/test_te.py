"""The stand-in for Transformer Engine is TE's own Python, is found by nobody else, and refuses what a GPU refuses."""

import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from testing.ranks import TE, run_ranks
from testing.te.extension import make_extension, put_kernels
from testing.te.tree import pinned_version

ROOT = Path(__file__).resolve().parents[2]


def test_nobody_finds_it_who_does_not_ask():
    assert find_spec("transformer_engine") is None


def versions(case):
    import transformer_engine

    return transformer_engine.__version__


def test_it_is_the_pinned_version():
    assert run_ranks(1, versions, [None], preload=TE) == [[pinned_version()]]


def multiply(dropped):
    """Multiply FP8 operands of which one lacks a copy; return what the GEMM says."""
    import torch
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    def operand(dimensions, columns=128):
        made = Float8BlockQuantizer(
            fp8_dtype=TE_DType[torch.float8_e4m3fn], rowwise=True, columnwise=True, block_scaling_dim=dimensions
        )
        return made(torch.randn(32, columns, generator=torch.Generator().manual_seed(1)))

    weight, x = operand(2), operand(1, 120 if dropped == "shape" else 128)
    if dropped in ("rowwise", "columnwise"):
        weight.update_usage(rowwise_usage=dropped != "rowwise", columnwise_usage=dropped != "columnwise")
    try:
        out = general_gemm(weight, x, out_dtype=torch.float32)[0]
    except RuntimeError as error:
        return str(error)
    exact = x.dequantize().float() @ weight.dequantize().float().t()
    return ((out - exact).norm() / exact.norm()).item()


def test_a_product_reads_the_copies_that_are_there_and_no_others():
    whole, rowwise, columnwise, shape = (
        found for (found,) in run_ranks(1, multiply, [None, "rowwise", "columnwise", "shape"], preload=TE)
    )
    assert whole == pytest.approx(0, abs=1e-6) and columnwise == whole  # a forward reads rows only
    assert "the rowwise copy of a Float8BlockwiseQTensor, which is not there" in rowwise
    assert "120 bytes" in shape


def test_a_program_imports_it_when_it_asks_for_it(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\nassert 'transformer_engine' not in sys.modules\n"
        "import transformer_engine.pytorch as te\nprint(te.Linear.__module__, *sys.argv[1:])\n"
    )
    script = [sys.executable, "-m", "testing.te", str(tmp_path / "program.py"), "key=value"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "transformer_engine.pytorch.module.linear key=value", done.stderr[-2000:]


def test_kernels_are_put_on_a_compiled_extension_only_where_it_is_like_the_stand_in():
    compiled = types.SimpleNamespace(**{n: v for n, v in vars(make_extension()).items() if not n.startswith("__")})
    compiled.quantize = None
    put_kernels(compiled)
    assert callable(compiled.quantize)
    del compiled.quantize
    with pytest.raises(AssertionError, match="transformer_engine_torch has no quantize$"):
        put_kernels(compiled)
    compiled.quantize, compiled.DType = None, types.SimpleNamespace(**compiled.DType.__members__ | {"kFloat8E5M2": 9})
    with pytest.raises(AssertionError, match=r"DType is .*'kFloat8E5M2': 9"):
        put_kernels(compiled)
