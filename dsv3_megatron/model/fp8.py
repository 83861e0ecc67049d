"""Giving the modules of a stage the formats that the precision policy says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from dsv3_megatron.model.layers.dispatch import dispatch_in_fp8
from dsv3_megatron.model.layers.experts import GroupedExperts
from dsv3_megatron.model.layers.linear import ColumnParallelLinear
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
    for linear in _fed_by_recomputation(chunk):
        # What a layer gathers over TP does not come again: recomputation brings a rank's share.
        gathers = isinstance(linear, ColumnParallelLinear) and linear.config.sequence_parallel
        if isinstance(getattr(linear, "products", None), Fp8Products) and not gathers:
            linear.products.input_comes_again = True
    return count


def _fed_by_recomputation(chunk: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the linear layers whose input is discarded after the forward and computed again in the backward.

    megatron-core tells TE's layers the same when it builds them (``set_save_original_input``).
    """
    for module in chunk.modules():
        if isinstance(module, TransformerLayer):
            if module.recompute_input_layernorm:
                attention = module.self_attention
                yield attention.linear_kv_down_proj
                yield getattr(attention, "linear_q_down_proj", None) or attention.linear_q_proj
            block = module.mlp.shared_experts if isinstance(module.mlp, MoELayer) else module.mlp
            if module.recompute_pre_mlp_layernorm and block is not None:
                yield block.linear_fc1
        if isinstance(module, GroupedExperts) and module.recomputes_activation:
            yield module.linear_fc2
