"""Settings -> megatron-core layer specs: which module stands where in a DeepSeek-V3 layer."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.routing.capacity import CapacityRouter
from dsv3_megatron.routing.router import SequenceBalancedRouter

# Transformer Engine's fused norms: their names in the module -> in checkpoints, which have those of the torch backend
# (checkpoint/hugging_face/names.py, our_shapes). The prefix of a layer goes before both.
NAMES_IN_CHECKPOINTS = {
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def layer_spec(backend: BackendSpecProvider, model: ModelSettings, *, moe: bool) -> ModuleSpec:
    """Return one pre-norm layer: h += MLA(norm(h)); h += FFN(norm(h)) (arXiv 2412.19437, figure 2)."""
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=True)
    # TE fuses a norm into the linear after it; a MoE layer starts with the router, so its norm stays a module.
    after_norm = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    latent_norm = IdentityOp if fused else norm
    attention = ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=backend.duplicated_linear(),
            linear_q_up_proj=after_norm,
            linear_kv_down_proj=backend.duplicated_linear(),
            linear_kv_up_proj=after_norm,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=latent_norm,
            kv_layernorm=latent_norm,
        ),
    )
    if moe:
        mlp = get_moe_module_spec_for_backend(backend, num_experts=model.n_routed_experts, moe_grouped_gemm=True)
        router = CapacityRouter if model.topk_method == "capacity" else SequenceBalancedRouter
        group_best = 1 if model.topk_method == "group_limited_greedy" else 2
        mlp.submodules.router = partial(router, normalise=model.norm_topk_prob, group_best=group_best)
        mlp_norm = norm
    else:
        layers = MLPSubmodules(
            linear_fc1=after_norm, linear_fc2=backend.row_parallel_linear(), activation_func=backend.activation_func()
        )
        mlp = ModuleSpec(module=MLP, submodules=layers)
        mlp_norm = IdentityOp if fused else norm
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NAMES_IN_CHECKPOINTS if fused else {},
        ),
    )


def decoder_spec(
    backend: BackendSpecProvider, model: ModelSettings, first: int, count: int
) -> TransformerBlockSubmodules:
    """Return decoder layers ``first`` (from 0) to ``first + count - 1``."""
    layers = [layer_spec(backend, model, moe=i >= model.first_k_dense_replace) for i in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True))


def mtp_spec(
    backend: BackendSpecProvider, model: ModelSettings, groups: ProcessGroupCollection | None
) -> ModuleSpec | None:
    """Return the multi-token-prediction modules, each one MoE layer behind a projection; None at depth 0 (2.2).

    Their layers are given the groups here: megatron-core hands an MTP layer none, and its global state knows nothing
    of mirrored stages (0.16.1).
    """
    if not model.num_nextn_predict_layers:
        return None
    norm = backend.layer_norm(rms_norm=True)
    moe = model.num_moe_layers > 0

    layer = layer_spec(backend, model, moe=moe)
    if groups is not None:
        layer.params = {**(layer.params or {}), "pg_collection": groups}
    layers = [
        ModuleSpec(
            module=MultiTokenPredictionLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=norm,
                hnorm=norm,
                eh_proj=backend.column_parallel_linear(),
                transformer_layer=layer,
                layer_norm=norm,
            ),
        )
        for _ in range(model.num_nextn_predict_layers)
    ]
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=layers)
    )
