"""Plain megatron-core over a recipe's shape: what its user writes after its own example, to be measured by.

Its GPTModel from its own layer spec over Transformer Engine, its DistributedDataParallel, its distributed optimizer,
its loop without a pipeline, its FP8 autocast by configuration. Of ours it has the recipe's numbers and nothing else: no
adaptation, no router, no schedule, no kernel. Fused are SwiGLU, residual addition, permutation and cross-entropy, and
the accumulation of weight gradients where its kernel is installed; other fields can be set from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def megatron_config(recipe: Any, fused: bool, **settings: Any) -> Any:
    """Return plain megatron-core's configuration of a recipe's shape; ``settings`` go before what stands here."""
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    model, scaling = recipe.model, recipe.model.rope_scaling
    values = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "rotary_base": model.rope_theta,
        "ffn_hidden_size": model.intermediate_size,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.initializer_range,
        "num_moe_experts": model.n_routed_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": model.n_shared_experts * model.moe_intermediate_size or None,
        "moe_layer_freq": [0] * model.first_k_dense_replace + [1] * model.num_moe_layers,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_router_topk": model.num_experts_per_tok,
        "moe_router_num_groups": model.n_group,
        "moe_router_group_topk": model.topk_group,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "moe_permute_fusion": fused,
        "cross_entropy_loss_fusion": fused,
        "cross_entropy_fusion_impl": "te",
        "gradient_accumulation_fusion": fused and find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }
    if scaling is None:
        # mscale_all_dim 0: megatron-core 0.16.1 scales the softmax by it even under plain RoPE.
        values |= {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    else:
        yarn = scaling.model_dump(exclude={"type", "factor"})
        values |= {"rope_type": "yarn", "rotary_scaling_factor": scaling.factor, **yarn}
    if recipe.precision.parameters == "bf16":
        values |= {"bf16": True, "params_dtype": torch.bfloat16}
    if recipe.precision.fp8 is not None:
        values |= {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    return MLATransformerConfig(**(values | settings))


def _optimizer(recipe: Any, config: Any, ddp: Any) -> Any:
    """Return its distributed AdamW: FP32 master weights, moments in the recipe's format."""
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optim = recipe.optim
    values = {
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "clip_grad": optim.clip,
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": True,
    }
    if recipe.precision.moments == "bf16":
        values |= {"use_precision_aware_optimizer": True}
        values |= {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    return get_megatron_optimizer(OptimizerConfig(**values), [ddp], use_gloo_process_groups=False)


def megatron(recipe: Any, device: str = "cuda", **settings: Any) -> Callable[[], Any]:
    """Return a step of plain megatron-core over a recipe's shape; each returns its mean loss."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.transformer.module import Float16Module

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, optim, length = recipe.model, recipe.optim, recipe.data.sequence_length
    config = megatron_config(recipe, device == "cuda", **settings)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    network = GPTModel(config, spec, model.vocab_size, length, position_embedding_type="rope").to(device)
    network = Float16Module(config, network) if config.bf16 else network
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(config, reduction, network)
    optimizer = _optimizer(recipe, config, ddp)
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    many = optim.global_batch // optim.micro_batch
    tokens = torch.randint(0, model.vocab_size, (many, optim.micro_batch, length + 1), device=device)
    positions = torch.arange(length, device=device).expand(optim.micro_batch, length)

    def forward(batches: Any, module: Any) -> tuple[Any, Callable]:
        ids = next(batches)
        losses = module(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous())
        return losses, lambda out: (loss := out.float().mean(), {"loss": loss.detach().clone()})

    def step() -> Any:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        found = forward_backward_no_pipelining(
            forward_step_func=forward,
            data_iterator=iter(tokens),
            model=ddp,
            num_microbatches=many,
            seq_length=length,
            micro_batch_size=optim.micro_batch,
        )
        optimizer.step()
        return sum(part["loss"] for part in found) / many

    step.facts = {"parameters": sum(p.numel() for p in network.parameters())}
    return step
