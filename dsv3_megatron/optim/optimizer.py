"""The optimizer of a run: megatron-core's distributed optimizer (ZeRO-1) over AdamW, with the recipe's values."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.optim.settings import OptimSettings
from dsv3_megatron.precision.settings import PrecisionSettings
from dsv3_megatron.precision.transformer_engine import recipe_name


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
    if held:
        config.fp8_recipe = recipe_name(precision.fp8)
    if precision.moments == "bf16":
        # Set after construction: the constructor demands TE for what our AdamW does too (megatron-core 0.16.1).
        config.use_precision_aware_optimizer = True
        # Whether AdamW keeps the float32 masters, as the constructor works it out. It cannot cast them to block-scaled
        # FP8: where weights are held in that, megatron-core keeps the masters and casts them.
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = not held or config.fp8_recipe == "delayed"
        config.exp_avg_dtype = config.exp_avg_sq_dtype = torch.bfloat16
        config.store_param_remainders = False
    return get_megatron_optimizer(config, chunks, pg_collection=groups, use_gloo_process_groups=False)


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use ``learning_rate`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


@torch.no_grad()
def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float) -> bool:
    """Clip gradients whose norm over all ranks is known, update the weights, and return whether that was done.

    The optimizer's own ``step`` prepares the gradients and reduces their norm once more. Call after ``prepare_grads``.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        coefficient = part.config.clip_grad / (grad_norm + 1e-6)  # as megatron-core's clip_grad_by_total_norm_fp32
        if part.config.clip_grad <= 0 or coefficient >= 1:
            continue
        name = "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients = [g for p in part.get_parameters() if (g := getattr(p, name, None)) is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)
    return optimizer.step_with_ready_grads()
