"""What megatron-core needs to run without CUDA, and the few mends it needs everywhere.

megatron-core 0.16.1 assumes a CUDA device in some forty places. Each adaptation below answers one such question from
outside; none changes a number. ``adapt_host`` must run before the first megatron import and is called by every module
of ours that needs it. For each entry: why, and how one sees that it can go (all: seen with megatron-core 0.16.1).

What is adapted depends on the device the run chose, not on what the machine has: a run on the CPU of a machine with
GPUs needs every answer that one without them needs. Commands choose with :func:`choose_device` before they import
megatron-core; who builds a model for a device without a choice made is served by ``build_parts``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Literal

import torch
import torch.distributed as dist

from parallel.errors import LayoutError, PackageError
from parallel.world import World

MEGATRON_CORE = "0.16.1"  # the version whose private functions are adapted here; pyproject.toml pins it too
_CPU = torch.device("cpu")
_state: dict[str, object] = {"device": _CPU, "adapted": False, "chosen": None}


def gpu_present() -> bool:
    """Return whether torch can use a CUDA device here."""
    return torch.version.cuda is not None and torch.cuda.is_available()


def choose_device(wanted: str, world: World) -> torch.device:
    """Return this rank's device for a recipe's ``run.device``, and prepare this process for it.

    ``auto`` is what the process was prepared for, else a GPU where one is. Raises: LayoutError: a GPU is asked for and
    none is there, or the node has fewer GPUs than ranks.
    """
    if wanted == "cuda" and not gpu_present():
        raise LayoutError("run.device = cuda, but torch finds no GPU here; set run.device=cpu")
    if wanted == "auto":
        wanted = _state["chosen"] or ("cuda" if gpu_present() else "cpu")
    if wanted == "cuda" and world.local_rank >= (count := torch.cuda.device_count()):
        raise LayoutError(
            f"LOCAL_RANK = {world.local_rank}, but torch sees {count} {'GPU' if count == 1 else 'GPUs'} on this node; "
            f"start at most {count} {'process' if count == 1 else 'processes'} here, or set run.device=cpu"
        )
    adapt_host(wanted)
    return torch.device("cuda", world.local_rank) if wanted == "cuda" else _CPU


def adapt_host(device: Literal["cpu", "cuda"] | None = None) -> None:
    """Make megatron-core importable and correct for a device; does the least for a GPU. Idempotent.

    ``device``: what this process trains on. None, as modules say that only import megatron-core: what was chosen
    before, else the CPU where there is no GPU, else nothing yet. The CPU may still be chosen after that (functions that
    megatron-core has compiled by then run as they are written), but not once CUDA is in use, nor a GPU after the CPU.

    Raises: PackageError: megatron-core has another version. LayoutError: the process is prepared for another device.
    """
    if not _state["adapted"]:
        _check_version()
        warnings.filterwarnings("ignore", module=r"megatron\.core.*")
        # torch 2.13 renames three collectives that megatron-core and torch 2.11 know by the old names only.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if device is None and not gpu_present():
        device = "cpu"
    chosen = _state["chosen"]
    if device not in (None, chosen):
        if chosen is not None or (device == "cpu" and gpu_present() and torch.cuda.is_initialized()):
            raise LayoutError(
                f"run.device = {device}, but this process is prepared for {chosen or 'cuda'}; choose in a process of "
                f'its own: dsv3_megatron.megatron.host.adapt_host("{device}") comes before everything else'
            )
        _state["chosen"] = device
        if device == "cpu":
            _adapt_to_no_cuda()
    if not _state["adapted"]:
        _state["adapted"] = True
        _adapt_anywhere()


def _adapt_to_no_cuda() -> None:
    _leave_functions_uncompiled()
    _answer_cuda_questions()
    _answer_cuda_random_state()
    _redirect_cuda_factories()
    _redirect_cuda_moves()
    _mend_cpu_split_sizes()
    _exchange_unequal_shares_over_gloo()


def _adapt_anywhere() -> None:
    _exchange_nothing_in_groups_of_one()
    _leave_sorted_tokens_alone()
    _mend_without_transformer_engine()
    _score_groups_by_their_two_best()
    _mend_recompute_without_fp8()
    _number_layers_by_stage()
    _mend_overlapped_plan()
    _take_masks_by_depth()
    _spare_collections_in_saves()
    _take_norms_on_the_device()
    _start_no_writer_processes()


def _check_version() -> None:
    """Raise PackageError unless megatron-core is the version whose private functions are replaced here."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        found = "not installed"
    if found != MEGATRON_CORE:
        raise PackageError(
            f"megatron-core = {found}, but this code replaces private functions of {MEGATRON_CORE} and is proven with "
            f"no other; pip install megatron-core=={MEGATRON_CORE}"
        )


@contextlib.contextmanager
def virtual_device(device: torch.device) -> Iterator[None]:
    """Let "the current CUDA device" be ``device`` inside: ``meta`` builds a true-size model without memory."""
    before = _state["device"]
    _state["device"] = device
    current = torch.cuda.current_device
    torch.cuda.current_device = _current_device
    try:
        with torch.device(device):
            yield
    finally:
        _state["device"] = before
        torch.cuda.current_device = current


def _current_device() -> torch.device:
    return _state["device"]


# -- without CUDA ------------------------------------------------------------------------------------------------------


def _leave_functions_uncompiled() -> None:
    """Why: megatron decorates small functions with torch.compile at import, which costs 3 s of inductor import and
    some 6 s of C++ compilation in the first step on a CPU. Can go when megatron decorates lazily.

    torch's own optimizers and checkpointing ask torch._dynamo to look away, which imports it for a second; where
    nothing is compiled their functions stand for themselves (torch 2.11 to 2.13). Can go when
    test_a_run_compiles_nothing passes without it."""
    import torch.utils.checkpoint

    if "megatron.core" in sys.modules:  # imported before the CPU was chosen: what is decorated runs as it is written
        torch.compiler.set_stance("force_eager")

    torch.compile = lambda function=None, *a, **k: function if function is not None else (lambda inner: inner)
    for owner in (torch.optim.Optimizer, torch.utils.checkpoint):
        for function in vars(owner).values():
            if "_disable_dynamo" in getattr(getattr(function, "__code__", None), "co_qualname", ""):
                plain = function.__wrapped__
                setattr(plain, "__dynamo_disable", plain)


class _Event:
    """A CUDA event of a device that finishes everything at once."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def _nothing(self, *args: object) -> None:
        pass

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream(torch.cpu.Stream):
    """The one stream of a device without streams."""

    def __new__(cls, *args: object, **kwargs: object) -> _Stream:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def _nothing(self, *args: object) -> None:
        pass

    wait_event = wait_stream = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


def _answer_cuda_questions() -> None:
    """Why: streams, events, device and memory queries are called without asking whether CUDA is there. Can go when a
    model trains on a CPU after commenting this out; the traceback names the first that cannot."""
    cuda, stream = torch.cuda, _Stream()

    def nothing() -> Callable[..., None]:
        return lambda *a, **k: None  # one function for each name: torch._dynamo refuses one that stands for two

    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.current_device = _current_device
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, nothing())
    cuda.device_count = lambda: 1
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *a, **k: 0)
    cuda.memory_stats = lambda *a, **k: {}
    cuda.nvtx = types.SimpleNamespace(
        range_push=nothing(), range_pop=nothing(), range=lambda *a, **k: contextlib.nullcontext()
    )
    torch.Tensor.record_stream = lambda self, s: None


def _answer_cuda_random_state() -> None:
    """Why: the model-parallel random tracker stores and restores CUDA generators. Here the default CPU generator
    plays that part. Can go when megatron's tracker takes a device."""
    cuda, generator = torch.cuda, torch.random.default_generator
    cuda.manual_seed = lambda seed: generator.manual_seed(seed) and None
    cuda.manual_seed_all = lambda seed: generator.manual_seed(seed) and None
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *a, **k: generator.get_state()
        module.set_rng_state = lambda state, *a, **k: generator.set_state(state)
    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: generator.get_state()
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    # It warns when the CPU state changes under it, which is now its normal way of working.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_cuda_factories() -> None:
    """Why: ``device="cuda"`` and ``pin_memory=True`` stand as literals in schedules, clipping and the optimizer. Can go
    when megatron takes its device from a tensor. torch's own list of constructors is filled first: it must hold the
    originals, or ``with torch.device("meta")`` silently stops working."""
    import torch.utils._device

    torch.utils._device._device_constructors()

    def redirected(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def make(*args: object, **kwargs: object) -> object:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _current_device()
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return make

    names = "tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like full_like as_tensor"
    for name in names.split():
        setattr(torch, name, redirected(getattr(torch, name)))


def _redirect_cuda_moves() -> None:
    """Why: ``.cuda()``, ``.to("cuda")`` and ``.pin_memory()`` are called on tensors, and the optimizer recognises
    float32 by ``tensor.type() == "torch.cuda.FloatTensor"``. Can go with the entry above."""
    tensor = torch.Tensor
    tensor.pin_memory = lambda self, *a, **k: self
    tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    to, type_name = tensor.to, tensor.type

    def move(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_current_device(), *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _current_device()
        return to(self, *args, **kwargs)

    def cuda_type(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        name = type_name(self, *args, **kwargs)
        if args or kwargs or self.device.type != "cpu":
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = move, cuda_type


def _mend_cpu_split_sizes() -> None:
    """Why: the all-to-all dispatcher turns split sizes into lists only when they are CUDA tensors, and
    ``all_to_all_single`` refuses tensors. Can go when maybe_move_tensor_to_cpu stops asking ``is_cuda``."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _exchange_unequal_shares_over_gloo() -> None:
    """Why: with TP inside experts over EP, the ranks of a TP group hold different numbers of rows; NCCL gathers and
    reduce-scatters such, gloo refuses ("invalid tensor size"). Can go when test_schedules_equal_one_process.py passes
    without it."""
    import megatron.core.tensor_parallel.mappings as mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        input_: torch.Tensor, group: dist.ProcessGroup, output_split_sizes: list[int] | None = None, *rest: object
    ) -> torch.Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            return gather(input_, group, output_split_sizes, *rest)
        longest = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        longest[: len(input_)] = input_
        parts = [torch.empty_like(longest) for _ in output_split_sizes]
        dist.all_gather(parts, longest, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes)])

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: dist.ProcessGroup, input_split_sizes: list[int] | None = None, *rest: object
    ) -> torch.Tensor:
        if input_split_sizes is None or len(set(input_split_sizes)) == 1:
            return reduce_scatter(input_, group, input_split_sizes, *rest)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


# -- on every machine --------------------------------------------------------------------------------------------------


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


def _mend_without_transformer_engine() -> None:
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


def _score_groups_by_their_two_best() -> None:
    """Why: megatron scores a group by its topk/topk_group best experts; DeepSeek-V3's code by its two best, always
    (arXiv 2412.19437's K_r/M = 2). The same for 8 experts of 4 groups, not for other sizes. Can go when
    test_logits_equal_transformers passes for top-2 of 2 groups without it."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    def group_limited_topk(
        scores: torch.Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and indices [T, topk] of the best experts inside the best ``group_topk`` groups."""
        grouped = scores.view(num_tokens, num_groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(group_topk, dim=-1, sorted=False).indices
        closed = torch.ones(num_tokens, num_groups, dtype=torch.bool, device=scores.device).scatter_(1, best, False)
        open_scores = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)
        return torch.topk(open_scores, k=topk, dim=-1)

    moe_utils.group_limited_topk = group_limited_topk


def _mend_recompute_without_fp8() -> None:
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


def _mend_overlapped_plan() -> None:
    """Two mends of megatron-core's overlapped forward and backward plan, which DualPipe's FB runs through.

    Freed inputs: the plan empties what a node was given wherever it is copied on the way, but some ways copy nothing
    ("setStorage ... out of bounds" without this). At EP 1 the all-to-all is the identity, so that dispatch, experts and
    combine are given what their neighbours hold. With one local expert there is nothing to sort and, without expert TP,
    nothing to gather: the first linear layer keeps its input for the weight gradient.

    MTP: a depth's output is kept attached to its node's graph for the later depths, so that above depth 1 the second
    backward fails ("backward through the graph a second time"); a detached copy mends it.

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


def _spare_collections_in_saves() -> None:
    """Why: gathering the optimizer's state calls ``gc.collect`` once a chain, most of what a save costs training: every
    object of the process is visited to free tensors that reference counts free anyway. Can go when
    distrib_optimizer.py no longer collects."""
    import megatron.core.optimizer.distrib_optimizer as distributed

    distributed.gc = types.SimpleNamespace(collect=lambda *a, **k: 0)


def _take_norms_on_the_device() -> None:
    """Why: without TE and Apex the gradient norm is put together on the host, one wait for the device a parameter. Can
    go when test_the_host_waits_only_where_it_must passes without it for backend torch."""
    import megatron.core.optimizer.clip_grads as clipping
    from megatron.core.utils import local_multi_tensor_l2_norm

    def norm(
        chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool
    ) -> tuple[torch.Tensor, None]:
        """Return the norm [1] of all tensors together, float32, on their device."""
        each = torch._foreach_norm(tensors[0])
        return torch.linalg.vector_norm(torch.stack(each)).float().reshape(1), None

    if clipping.l2_norm_impl is local_multi_tensor_l2_norm:
        clipping.l2_norm_impl = norm


def _start_no_writer_processes() -> None:
    """Why: planning a save starts a Manager process for the queue of its writer processes, 5 s and a crash where the
    main program has no main guard. checkpoint.write writes by itself and needs no queue. Can go when the planning of
    TorchDistSaveShardedStrategy.async_save asks for none."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writers

    writers._get_write_results_queue = lambda: None


# -- for planning ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def balanced_dispatch() -> Iterator[None]:
    """Let the all-to-all dispatcher send the same number of tokens to every expert inside, whatever the router says.

    Why: fake tensors have shapes but no numbers, and who is sent where is a number. Balanced routing is what a plan
    assumes anyway. Three spots read numbers (megatron-core 0.16.1); each can go when a fake forward of a MoE layer
    passes without it.
    """
    import numpy
    from megatron.core.transformer.moe import token_dispatcher as module

    dispatcher = module.MoEAlltoAllTokenDispatcher

    def preprocess(self: object, routing_map: torch.Tensor) -> object:
        sent, experts = routing_map.size(0) * self.config.moe_router_topk, self.num_experts
        counts = numpy.full(experts, sent // experts) + (numpy.arange(experts) < sent % experts)
        local = counts[self.local_expert_indices]
        self.num_out_tokens = sent
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = counts.reshape(self.ep_size, -1).sum(1)
            self.output_splits = numpy.full(self.ep_size, local.sum())
            self.output_splits_tp = numpy.full(self.tp_size, local.sum() * self.ep_size)
            self._maybe_update_cuda_sync_point("before_ep_alltoall")
        self.num_global_tokens_per_local_expert = local
        return local * self.ep_size * self.tp_size

    def permute(
        tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor | None = None, **sizes: object
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        index = torch.zeros(sizes["num_out_tokens"], dtype=torch.int64, device=tokens.device)
        chosen = None if probs is None else probs.T.contiguous().view(-1).index_select(0, index)
        return tokens.index_select(0, index), chosen, index

    def sort_chunks_by_idxs(
        tokens: torch.Tensor, split_sizes: object, sorted_idxs: object, probs: torch.Tensor | None = None, **how: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if sorted_idxs is None:
            return tokens, probs
        index = torch.arange(tokens.shape[0], device=tokens.device)
        return tokens.index_select(0, index), None if probs is None else probs.index_select(0, index)

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (dispatcher, "preprocess", preprocess),
            (dispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, counts=None: counts),
            (module, "permute", permute),
            (module, "sort_chunks_by_idxs", sort_chunks_by_idxs),
        ):
            stack.enter_context(replaced(owner, name, stand_in))
        yield


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Let ``owner.name`` be ``value`` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
