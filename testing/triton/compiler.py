"""Triton's compiler for a Hopper GPU, in processes of their own, which need none."""

from __future__ import annotations

from typing import Any

from testing.ranks import run_ranks

SHARED_MEMORY = 227 << 10  # bytes that a block can have on a Hopper
PRELOAD = "testing.triton.preload_compiler"


def compiled(kernels: list[tuple[str, str, dict[str, Any], dict[str, Any]]]) -> list[tuple[str, int]]:
    """Return (PTX, bytes of shared memory) of kernels: (module, name, types and constants by argument, options).

    Types are Triton's ("*bf16", "i32"); pointers and integers are taken for multiples of 16, as torch's mostly are.
    """
    return [found for (found,) in run_ranks(1, _compile, kernels, preload=PRELOAD)]


def _compile(kernel: tuple[str, str, dict[str, Any], dict[str, Any]]) -> tuple[str, int]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, arguments, options = kernel
    function = getattr(importlib.import_module(module), name)
    types = {key: value for key, value in arguments.items() if isinstance(value, str)}
    places = {key: (function.arg_names.index(key),) for key in arguments}
    source = ASTSource(
        fn=function,
        signature={key: types.get(key, "constexpr") for key in function.arg_names},
        constexprs={places[key]: value for key, value in arguments.items() if key not in types},
        attrs={places[key]: [["tt.divisibility", 16]] for key in types if types[key] != "fp32"},
    )
    made = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    return made.asm["ptx"], made.metadata.shared
