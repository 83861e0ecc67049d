"""Giving the modules of a stage the formats that the precision policy says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.model.dispatch import dispatch_in_fp8
from dsv3_megatron.precision.policy import layer_is_exempt, module_class
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings


def apply_fp8(
    chunk: torch.nn.Module,
    fp8: Fp8Settings | None,
    *,
    first_layer: int,
    layers: int,
    make: Callable[[Fp8Settings], Fp8Products] = Fp8Products,
) -> int:
    """Give every module of a stage what the policy says of it; return how many linear layers are in FP8.

    Args:
        chunk: a stage on the torch backend. On the te backend, whose linear layers have their own autocast, only the
            dispatch is of this policy.
        first_layer: number of its first decoder layer, from 0.
        layers: decoder layers of the whole model.
        make: the products of a layer.
    """
    if fp8 is None:
        return 0
    count = 0
    for name, module in chunk.named_modules():
        parts = name.split(".")
        number = int(parts[2]) + first_layer if parts[:2] == ["decoder", "layers"] and len(parts) > 2 else None
        if layer_is_exempt(fp8, number, layers):
            continue
        if hasattr(module, "products") and module_class(f"{name}.") == "linear":
            module.products = make(fp8)
            count += 1
        if hasattr(module, "cache_in_fp8"):
            module.cache_in_fp8 = fp8.swiglu_cache == "e4m3"
        if hasattr(module, "output_cache"):
            module.output_cache = fp8.attention_output_cache
        if isinstance(module, MoELayer) and fp8.dispatch == "e4m3":
            dispatch_in_fp8(module)
    return count
