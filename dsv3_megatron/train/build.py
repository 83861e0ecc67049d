"""Recipe + world -> everything a rank trains with: groups, stage, gradient buffers, optimizer."""

from __future__ import annotations

import torch

from dsv3_megatron.megatron.host import adapt_host
from dsv3_megatron.recipe import Recipe
from parallel.groups import build_groups, connect_groups, holder_groups
from parallel.layout import Layout
from parallel.pipeline.actions import Placement

adapt_host()

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from dsv3_megatron.checkpoint import te_amaxes
from dsv3_megatron.checkpoint.shares import buffer_entries, shares_of
from dsv3_megatron.model import te_attention
from dsv3_megatron.model.backend import choose_backend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.fp8 import apply_fp8
from dsv3_megatron.model.initialise import forget_drawn, initialise
from dsv3_megatron.model.stage import build_stage, keep_bias_in_float32
from dsv3_megatron.model.te_layers import settle_te_layers
from dsv3_megatron.optim.optimizer import build_optimizer, choose_optimizer
from dsv3_megatron.pipeline.model_stages import ModelStages
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.qk_clip import QkClip
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.precision.hopper import HopperFp8, why_not
from dsv3_megatron.precision.on_te import as_carried_out
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.transformer_engine import configure, exempt_no_mtp
from dsv3_megatron.train.ema import PREFIX, Ema
from dsv3_megatron.train.gradients import wrap_for_reduction
from dsv3_megatron.train.muon import let_muon_update


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the weights that forward reads."""
    return torch.bfloat16 if recipe.precision.parameters == "bf16" else torch.float32


def te_delays_weight_gradients(recipe: Recipe, backend: BackendSpecProvider) -> bool:
    """Return whether TE's layers are built to leave weight gradients to ``backward_dw``, as schedules with W need.

    Ours decide at every step; TE's at construction, and then for good.
    """
    return backend.name == "te" and recipe.parallel.schedule not in ("1f1b", "interleaved")


def build_parts(recipe: Recipe, layout: Layout, device: torch.device) -> Parts:
    """Build this rank's stages, wrap them for gradient reduction, and make the optimizer.

    The default process group must exist. Weights are those of step 0, the same in every layout.
    """
    adapt_host("cuda" if device.type == "cuda" else "cpu")
    backend = choose_backend(recipe.backend, device, lambda: _why_not_te_attention(recipe, layout, device))
    adamw = choose_optimizer(recipe.optim, backend.name, device, recipe.precision)
    placement = recipe.placement()
    mirrored = placement.kind == "mirror"
    groups = build_groups(layout, mirrored=mirrored)
    holders = holder_groups(layout, groups, mirrored=mirrored) if recipe.optim.name == "muon" else None
    connect_groups((groups.intra_dp_cp, groups.intra_expt_dp, *(holders or ())), device)
    model_parallel_cuda_manual_seed(recipe.run.seed, te_rng_tracker=False)
    MTPLossLoggingHelper.tracker.clear()  # global, and sized by the first model of the process (--multirun has several)
    layers = layers_of_stages(recipe)
    chunks = _build_chunks(recipe, layout, layers, placement, backend, groups, device)
    shared, copied = _join_embeddings(chunks, placement, groups)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        fp8_param_gather=recipe.precision.fp8 is not None and recipe.precision.fp8.hold_weights,
        delay_wgrad_compute=te_delays_weight_gradients(recipe, backend),
    )
    ddps = {s: wrap_for_reduction(chunk.config, chunk, groups, settings) for s, chunk in chunks.items()}
    optimizer = build_optimizer(list(ddps.values()), recipe.optim, recipe.precision, groups)
    for chunk in chunks.values():
        forget_drawn(chunk)
    if holders is not None:
        let_muon_update(optimizer, chunks, groups, holders, recipe.model, recipe.optim, device)
    rows = recipe.data.sequence_length // (layout.cp * layout.tp)
    shape = (rows, recipe.optim.micro_batch, recipe.model.hidden_size)
    stages = ModelStages(
        chunks,
        ddps,
        last_stage=placement.stages - 1,
        message=(shape, parameter_dtype(recipe), device),
        embedding_is_shared=shared,
        always_splits=settings.delay_wgrad_compute,
    )
    parts = Parts(recipe, layout, groups, device, backend, layers, chunks, ddps, optimizer, stages, copied)
    parts.adamw = adamw
    first_layers = {stage: parts.first_layer(stage) for stage in chunks}
    if recipe.optim.qk_clip is not None:
        parts.qk_clip = QkClip(chunks, first_layers, optimizer, groups, recipe.model, recipe.optim.qk_clip)
    if recipe.optim.ema_decay is not None:
        shares = shares_of(chunks, optimizer, groups)
        biases = buffer_entries(chunks, groups, PREFIX)
        parts.ema = parts.extra_states["ema"] = Ema(shares, recipe.optim.ema_decay, ddps.values(), biases)
    if backend.name == "te" and recipe.precision.fp8 is not None and recipe.precision.fp8.scaling == "delayed":
        parts.extra_states[te_amaxes.NAME] = te_amaxes.TeAmaxes(chunks, first_layers, groups)
    return parts


def _why_not_te_attention(recipe: Recipe, layout: Layout, device: torch.device) -> str | None:
    """Return why torch's attention is to serve among Transformer Engine's layers, or None where TE's own does."""
    if recipe.data.isolate_documents:
        return "data.isolate_documents"  # comes as an attention mask, which TE takes for one of pairs
    model = recipe.model
    why = te_attention.why_unfused(
        model.num_attention_heads // layout.tp,
        model.qk_nope_head_dim + model.qk_rope_head_dim,
        model.v_head_dim,
        parameter_dtype(recipe),
        device,
    )
    return why and f"Transformer Engine has none here: {why}"


def _build_chunks(
    recipe: Recipe,
    layout: Layout,
    layers: tuple[int, ...],
    placement: Placement,
    backend: BackendSpecProvider,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> dict[int, GPTModel]:
    """Return this rank's stages, weights drawn."""
    config = transformer_config(recipe.model, recipe.parallel, layout, dtype=parameter_dtype(recipe))
    fp8 = recipe.precision.fp8
    if backend.name == "te":
        configure(config, fp8)
        config.delay_wgrad_compute = te_delays_weight_gradients(recipe, backend)
    policy = as_carried_out(fp8) if fp8 is not None and backend.name == "te" else fp8
    make = HopperFp8 if fp8 is not None and why_not(fp8, device) is None else Fp8Products
    chunks = {}
    for stage in placement.stages_of(groups.pp.rank()):
        # No gradients: where TE holds weights in FP8 it would keep what they were built from for the optimizer, and
        # weights are drawn afterwards.
        with torch.no_grad():
            chunk = build_stage(
                config,
                recipe.model,
                backend,
                stage=stage,
                layers_of_stages=layers,
                sequence_length=recipe.data.sequence_length,
                groups=groups,
            )
        chunk.to(device)
        std = recipe.model.initializer_range
        first = sum(layers[:stage])
        initialise(chunk, first_layer=first, std=std, seed=recipe.run.seed, groups=groups)
        keep_bias_in_float32(chunk)
        if backend.name == "te":
            settle_te_layers(chunk)
            if fp8 is not None:
                exempt_no_mtp(chunk)
        apply_fp8(chunk, policy, first_layer=first, layers=recipe.model.num_hidden_layers, make=make)
        chunks[stage] = chunk
    return chunks


def _join_embeddings(
    chunks: dict[int, GPTModel], placement: Placement, groups: ProcessGroupCollection
) -> tuple[bool, torch.nn.Parameter | None]:
    """Make the MTP modules' embedding the model's. Return (physically shared here, this rank's copy to be summed).

    Where the first and the last stage meet on a rank there is one parameter, and it belongs to the first; elsewhere
    each holds a copy, and the two gradients are added, unless it is frozen.
    """
    first, last = chunks.get(0), chunks.get(placement.stages - 1)
    if placement.stages == 1:
        return False, None
    if first and last:
        if last.mtp_process:
            del last.embedding
            object.__setattr__(last, "embedding", first.embedding)  # used there, not registered as a part of it
        return last.mtp_process, None
    end = first or last
    if end is None or end.config.mtp_num_layers is None:
        return False, None
    weight = end.embedding.word_embeddings.weight
    if not weight.requires_grad:
        return False, None
    weight.shared_embedding = True  # a bucket of its own: both copies are sharded alike
    weight.shared = end is last  # counted once in the gradient norm
    return False, weight
