"""Stage number -> module, and how layers are spread over stages."""

from __future__ import annotations

import copy

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv3_megatron.model.freeze import DECODER_LAYER, is_frozen
from dsv3_megatron.model.layers.embedding import VocabParallelEmbedding
from dsv3_megatron.model.layers.linear import DuplicatedLinear, OutputHead
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.model.specs import decoder_spec, mtp_spec
from dsv3_megatron.routing.router import SequenceBalancedRouter

LATENT_NORM_EPS = 1e-6


def build_stage(
    config: MLATransformerConfig,
    model: ModelSettings,
    backend: BackendSpecProvider,
    *,
    stage: int,
    layers_of_stages: tuple[int, ...],
    sequence_length: int,
    groups: ProcessGroupCollection | None = None,
) -> GPTModel:
    """Return stage ``stage`` of the model: its decoder layers, on the first stage the embedding, on the last the MTP
    modules and the output head. What ``model.freeze`` names asks for no gradient."""
    first, last = stage == 0, stage == len(layers_of_stages) - 1
    start = sum(layers_of_stages[:stage])
    config = copy.copy(config)
    config.first_layer = start  # read by host.py's _number_layers_by_stage
    # megatron-core's name for "the specs bring an activation module"; set after construction, which asks for TE's.
    config.use_te_activation_func = backend.activation_func() is not None
    module = GPTModel(
        config,
        decoder_spec(backend, model, start, layers_of_stages[stage]),
        vocab_size=model.vocab_size,
        max_sequence_length=sequence_length,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp_spec(backend, model, groups) if last else None,
        pg_collection=groups,
    )
    _use_our_ends(module)
    _norm_latents_as_published(module)
    for name, parameter in module.named_parameters():
        if is_routed_expert(name):
            parameter.allreduce = False  # as in GroupedLinear; TE's layers need the same at EP 1
    for part in module.modules():
        if isinstance(part, DuplicatedLinear) and groups is not None:
            part.tp_group = groups.tp  # which of the TP ranks' copies a checkpoint takes
    keep_bias_in_float32(module)
    _freeze(module, model, first_layer=start)
    return module


def global_name(name: str, first_layer: int) -> str:
    """Return a parameter's name in the whole model: decoder layers are numbered from the first stage on."""
    return DECODER_LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", name)


def _freeze(module: GPTModel, model: ModelSettings, *, first_layer: int) -> None:
    """Ask for no gradient of what is frozen, and for no update of the biases of frozen routers."""
    for name, parameter in module.named_parameters():
        if is_frozen(model.freeze, global_name(name, first_layer)):
            parameter.requires_grad_(False)
    for name, part in module.named_modules():
        if isinstance(part, SequenceBalancedRouter):
            part.bias_is_frozen = is_frozen(model.freeze, global_name(f"{name}.expert_bias", first_layer))


def _use_our_ends(module: GPTModel) -> None:
    """Let embedding and output head be ours, which add their gradients up in float32: GPTModel names the classes it
    makes them of (0.16.1), and they differ in their forward only."""
    for name, ours in (("embedding.word_embeddings", VocabParallelEmbedding), ("output_layer", OutputHead)):
        if (part := dict(module.named_modules()).get(name)) is not None:
            assert issubclass(ours, type(part)), (name, type(part))
            part.__class__ = ours


def _norm_latents_as_published(module: GPTModel) -> None:
    """Let the norms of MLA's latents add 1e-6 to the mean square, whatever rms_norm_eps says: so do the published code
    and transformers (DeepseekV3Attention); megatron-core gives them rms_norm_eps (0.16.1)."""
    for part in module.modules():
        if isinstance(part, MLASelfAttention):
            for latent in ("q", "kv"):
                norm = getattr(part, f"{latent}_layernorm", None)
                if norm is not None:  # full-rank queries have none
                    inside = isinstance(norm, IdentityOp)  # TE norms inside the linear after it
                    holder = getattr(part, f"linear_{latent}_up_proj") if inside else norm
                    assert hasattr(holder, "eps"), type(holder)
                    holder.eps = LATENT_NORM_EPS


def is_routed_expert(parameter_name: str) -> bool:
    """Return whether a parameter belongs to routed (not shared) experts, by its name in the module."""
    return ".experts." in parameter_name and ".shared_experts." not in parameter_name


def keep_bias_in_float32(module: torch.nn.Module) -> None:
    """Keep the routers' biases in float32 where the module was cast to BF16: an update of 0.001 would be lost."""
    for part in module.modules():
        if hasattr(part, "_maintain_float32_expert_bias"):
            part._maintain_float32_expert_bias()


@torch.no_grad()
def forward_logits(module: GPTModel, tokens: Tensor) -> Tensor:
    """Return logits [B, S, vocabulary on this TP rank] of a whole model (first and last stage in one).

    megatron-core's GPTModel with MTP cannot return logits (it clones labels that are not there), so its MTP part is
    set aside for the call (0.16.1).
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mtp, depth, training = module.mtp_process, module.config.mtp_num_layers, module.training
    module.mtp_process, module.config.mtp_num_layers = False, None
    module.eval()
    try:
        return module(tokens, positions, None)
    finally:
        module.mtp_process, module.config.mtp_num_layers = mtp, depth
        module.train(training)
