"""The optimizer of a run: megatron-core's distributed optimizer (ZeRO-1) over AdamW, with the recipe's values."""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as optimizers
import megatron.core.optimizer.distrib_optimizer as distributed
import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.megatron.fixes import use_torch_norms
from dsv3_megatron.optim.adamw import FusedAdam
from dsv3_megatron.optim.muon import MuonWithAdamW
from dsv3_megatron.optim.settings import OptimSettings
from dsv3_megatron.precision.settings import PrecisionSettings
from dsv3_megatron.precision.transformer_engine import recipe_name

# Whose AdamW megatron-core found when it was imported.
_THEIRS = (
    "Transformer Engine" if distributed.USING_TE_OPTIMIZER else "Apex" if distributed.USING_APEX_OPTIMIZER else None
)


def build_optimizer(
    chunks: list[torch.nn.Module],
    optim: OptimSettings,
    precision: PrecisionSettings,
    groups: ProcessGroupCollection,
) -> MegatronOptimizer:
    """Return the optimizer over DDP-wrapped model chunks.

    States are sharded over the data-parallel ranks (ZeRO-1). Norm gains are exempt from weight decay (megatron-core's
    rule for one-dimensional parameters; the paper does not say).
    """
    low = precision.parameters == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=1.0,  # set for every step from the regime
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.epsilon,
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=optim.clip,
    )
    held = precision.fp8 is not None and precision.fp8.hold_weights
    if precision.fp8 is not None and precision.fp8.hold_weights:
        config.fp8_recipe = recipe_name(precision.fp8)
    if precision.moments == "bf16":
        # Set after construction: the constructor demands TE for what our AdamW does too (megatron-core 0.16.1).
        config.use_precision_aware_optimizer = True
        # Whether AdamW keeps the float32 masters, as the constructor works it out. It cannot cast them to block-scaled
        # FP8: where weights are held in that, megatron-core keeps the masters and casts them.
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = not held or config.fp8_recipe == "delayed"
        config.exp_avg_dtype = config.exp_avg_sq_dtype = torch.bfloat16
        config.store_param_remainders = False
    optimizer = get_megatron_optimizer(config, chunks, pg_collection=groups, use_gloo_process_groups=False)
    for group in optimizer.param_groups:  # megatron-core marks who is exempt; its own scheduler would act on it
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return optimizer


def choose_optimizer(optim: OptimSettings, backend: str, device: torch.device, precision: PrecisionSettings) -> str:
    """Let megatron-core use TE's or Apex's AdamW where one is installed and can do what the recipe asks, else ours;
    Muon is ours, and so is the AdamW beside it.

    Return whose it is, for people. Ours: on a CPU (but under a stand-in for TE, which brings its own), without TE and
    Apex, and for BF16 moments without TE: Apex's holds them in float32 only.
    """
    on_cpu = backend == "torch" and device.type == "cpu"
    if on_cpu:
        use_torch_norms()
    if optim.name == "muon":
        use_ours(MuonWithAdamW)
        return "Muon and AdamW of this package over torch's"
    if on_cpu:
        why = ""
    elif _THEIRS is None:
        why = " (neither Transformer Engine nor Apex is installed)"
    elif _THEIRS == "Apex" and precision.moments == "bf16":
        why = " (Apex's cannot hold moments in BF16)"
    elif optimizers.Adam in (FusedAdam, MuonWithAdamW):
        why = " (chosen earlier in this process)"
    else:
        return f"{_THEIRS}'s fused AdamW"
    use_ours(FusedAdam)
    return f"AdamW of this package over torch's{why}"


def use_ours(adam: type[FusedAdam]) -> None:
    """Let megatron-core use an optimizer of ours where it would use TE's or Apex's AdamW.

    It decides by names bound at import (0.16.1); can go when the optimizer class is an argument.
    """
    optimizers.Adam = distributed.Adam = adam
    optimizers.USING_PYTORCH_OPTIMIZER = distributed.USING_APEX_OPTIMIZER = False
    optimizers.is_te_min_version = lambda *a, **k: False
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that megatron-core chains, one for experts and one for the rest, or the only one.

    Without one for what is frozen on all ranks: megatron-core has a stub in its place, or nothing.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def run_of(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return this rank's run of a parameter as the inner optimizer of a part has it; None where the part has none
    (megatron-core 0.16.1)."""
    if (found := part.model_param_group_index_map.get(parameter)) is None:
        return None
    group, place = found
    return part.optimizer.param_groups[group]["params"][place]


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


@torch.no_grad()
def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float) -> bool:
    """Clip gradients whose norm over all ranks is known, update the weights, and return whether that was done.

    The optimizer's own ``step`` prepares the gradients and reduces their norm once more. Call after ``prepare_grads``.
    """
    for part in parts_of(optimizer):
        coefficient = part.config.clip_grad / (grad_norm + 1e-6)  # as megatron-core's clip_grad_by_total_norm_fp32
        if part.config.clip_grad <= 0 or coefficient >= 1:
            continue
        name = "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients = [g for p in part.get_parameters() if (g := getattr(p, name, None)) is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)
    return optimizer.step_with_ready_grads()
