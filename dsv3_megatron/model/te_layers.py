"""What Transformer Engine's layers are told once they are built, which neither they nor megatron-core say of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv3_megatron.model.stage import is_routed_expert


def settle_te_layers(chunk: torch.nn.Module) -> None:
    """Let a stage's TE layers add weight gradients in float32, none where weights are frozen, and every shard of a
    gradient count once in its norm."""
    for layer in chunk.modules():
        if hasattr(layer, "need_backward_dw") and not any(_weights_train(layer)):
            # Asked for the weight gradient that it has queued, a layer without one raises "Pop empty queue" (2.20.2).
            layer.need_backward_dw = lambda: False  # type: ignore[assignment]  # TE's own method
        if hasattr(layer, "fuse_wgrad_accumulation"):
            # A product adds its float32 sum to ``main_grad``. Otherwise every microbatch's gradient is rounded to BF16
            # first, and a grouped layer that owes weight gradients keeps a BF16 buffer of all its weights for each
            # microbatch. megatron-core's field for it would have the output head ask for Apex as well.
            layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]  # TE's own field
    for name, weight in chunk.named_parameters():
        # The norm counts a weight of every TP rank where it is marked as sharded, else of the first one. TE marks all
        # weights of its linear layers (linear.py, reset_parameters), also those that every TP rank holds whole, and
        # none of its grouped layers without a TP group, whose shards lie on all TP ranks.
        if is_routed_expert(name):
            weight.tensor_model_parallel = True
        elif getattr(weight, "sequence_parallel", False):
            weight.tensor_model_parallel = False


def _weights_train(layer: torch.nn.Module) -> Iterator[bool]:
    """Yield of every matrix of a TE layer whether it is trained: a gain that is fused into it has no product."""
    return (p.requires_grad for name, p in layer.named_parameters(recurse=False) if name.startswith("weight"))
