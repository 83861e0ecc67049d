"""Products: summed in float32, rounded once to the output's format, or added to it.

Operands are column-major in TE's calls: ``transA`` False reads A's columnwise copy where there are two.
"""

from __future__ import annotations

from torch import Tensor

from testing.te.calls import record
from testing.te.kernels.formats import torch_dtype
from testing.te.kernels.operands import is_empty, kind, read


def generic_gemm(
    A: object, transA: bool, B: object, transB: bool, D: Tensor | None, quantizer: object, output_dtype: object,
    bias: Tensor | None, bias_type: object, gelu: bool, gelu_in: Tensor | None, grad: bool, workspace: Tensor,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, comm_overlap: object = None,
    comm_type: object = None, extra_output: Tensor | None = None, bulk_overlap: bool = False, alpha: float = 1.0,
    beta: float | None = None,
) -> tuple:  # fmt: skip
    """Return (D = op(B) op(A), no bias gradient, no GELU input, ``extra_output``)."""
    if quantizer is not None or gelu or comm_overlap is not None or (bias is not None and bias.numel()):
        raise NotImplementedError("testing/te: a GEMM with a quantised output, a bias, GELU or overlap")
    out = _product(A, transA, B, transB)
    dtype = D.dtype if D is not None else torch_dtype(output_dtype)
    record("gemm", layout=_layout(transA, transB), a=kind(A), b=kind(B), dtype=dtype, accumulate=accumulate,
           into=D is not None, split=use_split_accumulator)  # fmt: skip
    if D is None:
        out = out.to(dtype)
        return (out if transB else out.reshape(*B.size()[:-1], out.shape[-1])), None, None, extra_output
    _put(out, D, accumulate)
    return D, None, None, extra_output


def grouped_gemm(
    A: list, transa: bool, B: list, transb: bool, out: list[Tensor], out_dtype: object, m_splits: list[int],
    bias: list[Tensor], bias_dtype: object, single_output: bool, gelu: list[Tensor], grad: bool, workspaces: list,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, sm_margin: int,
) -> list[Tensor]:  # fmt: skip
    """Multiply every pair into its own output; with ``single_output`` into consecutive rows of the one output."""
    outs = list(out[0].split(list(m_splits))) if single_output else list(out)
    record("grouped_gemm", layout=_layout(transa, transb), a=kind(A[0]), b=kind(B[0]), dtype=outs[0].dtype,
           accumulate=accumulate, split=use_split_accumulator)  # fmt: skip
    for a, b, into in zip(A, B, outs):
        if into.numel() == 0:
            continue
        if is_empty(b):  # no tokens: the sum over them is zero
            into.zero_() if not accumulate else None
        else:
            _put(_product(a, transa, b, transb), into, accumulate)
    return bias


def _product(a: object, transa: bool, b: object, transb: bool) -> Tensor:
    x, y = read(b, "columnwise" if transb else "rowwise"), read(a, "rowwise" if transa else "columnwise")
    return (x.t() if transb else x) @ (y.t() if transa else y)


def _put(found: Tensor, into: Tensor, accumulate: bool) -> None:
    if found.shape != into.shape and found.numel() != into.numel():
        raise RuntimeError(f"a GEMM's output is {tuple(found.shape)}, its place {tuple(into.shape)}")
    rounded = found.to(into.dtype).view(into.shape)
    into.add_(rounded) if accumulate else into.copy_(rounded)


def _layout(transa: bool, transb: bool) -> str:
    return ("T" if transa else "N") + ("T" if transb else "N")
