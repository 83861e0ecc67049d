"""A stand-in for ``transformer_engine_torch``, the compiled half of Transformer Engine: its names, our kernels.

A function that no kernel here stands for can be looked up (TE does so at import) but not called.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable

import torch

from testing.te.kernels import KERNELS

# Numbers as in transformer_engine/common/include: TE's Python compares and stores them.
_ENUMERATIONS = {
    "DType": {
        "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "FP8FwdTensors": {f"GEMM{g}_{what}": 3 * (g - 1) + i for g in (1, 2, 3) for i, what in enumerate(
        ("INPUT", "WEIGHT", "OUTPUT"))},
    "FP8BwdTensors": {f"GRAD_{what}{g}": 2 * (g - 1) + i for g in (1, 2, 3) for i, what in enumerate(
        ("OUTPUT", "INPUT"))},
    "NVTE_Fused_Attn_Backend": {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
}  # fmt: skip


class _AnyName(type):
    """The class of an enumeration whose members nobody here reads: it has every name."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len(cls.__dict__)
        setattr(cls, name, value)
        return value


def make_extension() -> types.ModuleType:
    """Return the module."""
    module = types.ModuleType("transformer_engine_torch", __doc__)
    for name, members in _ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, members))
    _put(module)
    module.get_cudnn_version = lambda: 91900
    module.get_cublasLt_version = lambda: 130100
    module.get_num_cublas_streams = lambda: 1

    def looked_up(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(module, name, made)
        return made

    module.__getattr__ = looked_up
    return module


def put_kernels(compiled: types.ModuleType) -> None:
    """Put our kernels in the place of the compiled ones, so that all else is compiled: names, numbers, classes.

    Raises: AssertionError: the stand-in has a name or a number that the compiled extension has not.
    """
    unknown = [name for name in KERNELS if not hasattr(compiled, name)]
    assert not unknown, f"transformer_engine_torch has no {', '.join(unknown)}"
    for name, members in _ENUMERATIONS.items():
        found = {member: int(getattr(getattr(compiled, name), member)) for member in members}
        assert found == members, f"transformer_engine_torch.{name} is {found}, the stand-in's {members}"
    _put(compiled)


def _put(module: types.ModuleType) -> None:
    for name, kernel in KERNELS.items():
        setattr(module, name, torch.no_grad()(kernel))


def _missing(name: str) -> Callable:
    def kernel(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"testing/te has no kernel {name}; write one under testing/te/kernels")

    kernel.__name__ = name
    return kernel
