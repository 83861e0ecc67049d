"""What megatron-core needs on every machine: its faults, and its costs, fixed from outside.

For each: why, and how one sees that it can go. All were seen with megatron-core 0.16.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

# megatron-core is imported inside the functions: not before the process is prepared, and only where it is adapted.


def apply_fixes() -> None:
    """Replace the functions named below. Once a process."""
    _exchange_nothing_in_groups_of_one()
    _leave_sorted_tokens_alone()
    _fix_without_transformer_engine()
    _fix_recompute_without_fp8()
    _number_layers_by_stage()
    _fix_overlapped_plan()
    _take_masks_by_depth()
    _take_norms_on_the_device()


def _exchange_nothing_in_groups_of_one() -> None:
    """Why: with one data-parallel rank (of the experts: wherever EP is all of DP) gradients are reduced and weights
    gathered all the same, in place, from a buffer into itself; gloo copies them twice. Can go when
    test_a_group_of_one_exchanges_nothing passes without it."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def unless_alone(collective: Callable) -> Callable:
        @functools.wraps(collective)
        def call(output: torch.Tensor, source: torch.Tensor, *args: object, group: object, **how: object) -> object:
            if group.size() == 1 and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, *args, group=group, **how)

        return call

    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)


def _leave_sorted_tokens_alone() -> None:
    """Why: tokens of several ranks lie by rank and are sorted by expert; those of one rank lie by expert already, and
    the all-to-all dispatcher copies them into the same order, there and back. Can go when
    test_tokens_of_one_rank_are_not_sorted_again passes without it."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    init, sort = dispatcher.MoEAlltoAllTokenDispatcher.__init__, dispatcher.sort_chunks_by_idxs

    @functools.wraps(init)
    def init_of_one_or_many(self: object, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        if self.ep_size * self.tp_size == 1:
            self.sort_input_by_local_experts = self.restore_output_by_local_experts = None

    @functools.wraps(sort)
    def sort_chunks_by_idxs(
        tokens: torch.Tensor, sizes: object, order: object, probs: torch.Tensor | None = None, **how: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (tokens, probs) if order is None else sort(tokens, sizes, order, probs=probs, **how)

    dispatcher.MoEAlltoAllTokenDispatcher.__init__ = init_of_one_or_many
    dispatcher.sort_chunks_by_idxs = sort_chunks_by_idxs


def _fix_without_transformer_engine() -> None:
    """Why: multi_latent_attention.HAVE_TE is True although TE is absent, and moe_utils.te_general_gemm is undefined
    then. Can go when importing the two without TE leaves False and None."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as attention

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        attention.HAVE_TE = False


def _fix_recompute_without_fp8() -> None:
    """Why: CheckpointWithoutOutput does ``self.fp8 = fp8 is not None`` and callers pass False, so recompute asks for
    TE's FP8 state without FP8. Can go when recompute of the norms works without this line and without TE."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def init(self: object, fp8: object = None) -> None:
        original(self, fp8=fp8 or None)

    CheckpointWithoutOutput.__init__ = init


def _number_layers_by_stage() -> None:
    """Why: megatron-core numbers the layers of a stage by its pipeline rank, of which a rank under DualPipe has two.
    Here each stage's configuration says which layer it starts with (model.stage.build_stage). Can go when the offset
    of a layer is an argument of TransformerBlock."""
    import megatron.core.transformer.multi_token_prediction as mtp
    import megatron.core.transformer.transformer_block as block
    import megatron.core.transformer.transformer_layer as layer

    def offset(config: object, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        return getattr(config, "first_layer", 0)

    for module in (mtp, block, layer):
        module.get_transformer_layer_offset = offset


def _fix_overlapped_plan() -> None:
    """Two fixes of megatron-core's overlapped forward and backward plan, which DualPipe's FB runs through.

    Freed inputs: the plan empties what a node was given wherever it is copied on the way, but some ways copy nothing
    ("setStorage ... out of bounds" without this). At EP 1 the all-to-all is the identity, so that dispatch, experts and
    combine are given what their neighbours hold. With one local expert there is nothing to sort and, without expert TP,
    nothing to gather: the first linear layer keeps its input for the weight gradient.

    MTP: a depth's output is kept attached to its node's graph for the later depths, so that above depth 1 the second
    backward fails ("backward through the graph a second time"); a detached copy does.

    Each can go when test_schedules_equal_one_process.py passes without it."""
    import megatron.core.models.gpt.fine_grained_callables as callables

    frees, build = callables.should_free_input, callables.build_mtp_layer_callables

    def should_free_input(name: str, is_moe: bool, config: object) -> bool:
        ep, experts = config.expert_model_parallel_size, config.num_moe_experts
        if ep == 1 or (name == "mlp" and experts == ep and config.expert_tensor_parallel_size == 1):
            return False
        return frees(name, is_moe, config)

    def build_mtp_layer_callables(layer: torch.nn.Module) -> tuple[list, dict]:
        functions, weight_gradients = build(layer)

        def postprocess(node: object, hidden: torch.Tensor) -> torch.Tensor:
            hidden, state = layer._postprocess(hidden), node.chunk_state
            if not node.is_last_layer:
                state.mtp_hidden_states.append(node.detach(hidden))
                return hidden
            hidden = torch.cat([*state.mtp_hidden_states, hidden], dim=0)
            state.mtp_hidden_states = None
            return hidden

        functions[4] = postprocess
        return functions, weight_gradients

    callables.should_free_input = should_free_input
    callables.build_mtp_layer_callables = build_mtp_layer_callables


def _take_masks_by_depth() -> None:
    """Why: the loss mask of a multi-token-prediction depth is the main one rolled, which lets a depth predict across
    packed documents; boundaries are known to megatron-core only through packed_seq_params, which its overlapped plan
    refuses with MTP. Here GPTModel may be given model.depth_masks.DepthMasks for a loss mask, and "rolling" it takes
    the next depth's. Can go when the plan takes packed_seq_params with MTP and CP."""
    import megatron.core.models.gpt.gpt_model as gpt

    roll = gpt.roll_tensor

    @functools.wraps(roll)
    def roll_tensor(tensor: object, *args: object, **kwargs: object) -> object:
        next_depth = getattr(tensor, "next_depth", None)
        return roll(tensor, *args, **kwargs) if next_depth is None else next_depth()

    gpt.roll_tensor = roll_tensor


def _take_norms_on_the_device() -> None:
    """Why: without TE and Apex the gradient norm is put together on the host, one wait for the device a parameter. Can
    go when test_the_host_waits_only_where_it_must passes without it for backend torch."""
    import megatron.core.optimizer.clip_grads as clipping
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clipping.l2_norm_impl is local_multi_tensor_l2_norm:
        clipping.l2_norm_impl = _norm


def use_torch_norms() -> None:
    """Let gradient norm, clipping and the optimizer's copies be computed by torch although TE or Apex is installed.

    Why: megatron-core 0.16.1 takes their kernels wherever they can be imported, and these refuse tensors of a CPU. Can
    go when it asks for the tensors' device."""
    import megatron.core.optimizer.clip_grads as clipping
    import megatron.core.optimizer.optimizer as optimizer
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    for module in (clipping, optimizer):
        module.multi_tensor_applier = local_multi_tensor_applier
        module.multi_tensor_scale_impl = local_multi_tensor_scale
    clipping.l2_norm_impl = _norm


def _norm(
    chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm [1] of all tensors together, float32, on their device."""
    each = torch._foreach_norm(tensors[0])
    return torch.linalg.vector_norm(torch.stack(each)).float().reshape(1), None
