"""A stage of the model at true size on fake tensors: the real modules, run by the real pipeline code, without memory.

Fake tensors have shape, dtype and storage size, but no numbers. What needs numbers is answered for them: routing is
balanced (balanced_dispatch.py), tests for NaN say no. On a GPU three leaf functions are told to keep what its fused
kernels keep: attention its operands, output and one number a row (FlashAttention), norms their input, SwiGLU its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from dsv3_megatron.megatron.host import adapt_host
from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.planning.memory.balanced_dispatch import balanced_dispatch

adapt_host("cpu")  # on a machine with GPUs too: fake tensors of the CPU are all that is needed

from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.costs import logit_block
from dsv3_megatron.model.fp8 import apply_fp8
from dsv3_megatron.model.layers import attention, attention_cache, dispatch, max_logits, swiglu
from dsv3_megatron.model.layers.norm import RMSNorm
from dsv3_megatron.model.stage import build_stage
from dsv3_megatron.pipeline.model_stages import ModelStages
from dsv3_megatron.precision import products, weight_gradients
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.build import parameter_dtype
from parallel.fake_world import fake_world
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.pipeline.live_memory import LiveMemory


@dataclass
class FakeStage:
    """One stage that can be run, and the count of what is alive."""

    runner: ModelStages
    batch: dict[str, Tensor]
    memory: LiveMemory
    message_bytes: int
    module: torch.nn.Module
    is_last: bool


@contextmanager
def fake_stage(recipe: Recipe, layout: Layout, layers: tuple[int, ...], stage: int) -> Iterator[FakeStage]:
    """Build stage ``stage`` of the recipe on one rank of ``layout`` for as long as the block lasts.

    The world is the smallest that has the layout's TP, CP and EP groups: what a rank computes does not depend on the
    rest. Parameters are those of a rank, exactly.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # after adapt_host
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    alone = _smallest(layout)
    with ExitStack() as stack:
        stack.enter_context(fake_world(alone.world_size))
        groups = build_groups(alone)
        model_parallel_cuda_manual_seed(recipe.run.seed, te_rng_tracker=False)
        MTPLossLoggingHelper.tracker.clear()
        stack.callback(MTPLossLoggingHelper.tracker.clear)
        for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):  # else a real run after this finds a fake scale there
            stack.enter_context(replaced(scaler, "main_loss_backward_scale", scaler.main_loss_backward_scale))
        stack.enter_context(balanced_dispatch())
        stack.enter_context(_small_integers_known())
        stack.enter_context(_storages_not_copied())
        stack.enter_context(replaced(fake_tensor.FakeTensor, "data_ptr", lambda x: x.untyped_storage()._cdata))
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(_FakeMemory(resolution_bytes=_resolution(recipe, alone)))
        if recipe.cluster.device != "cpu":
            stack.enter_context(_fused_leaves())
            for owner, name in _KERNELS:
                stack.enter_context(_as_one_kernel(owner, name, memory))
        config = transformer_config(recipe.model, recipe.parallel, alone, dtype=parameter_dtype(recipe))
        config.perform_initialization = False  # it compares random states, which are numbers
        chunk = build_stage(
            config,
            recipe.model,
            TorchBackend(),
            stage=stage,
            layers_of_stages=layers,
            sequence_length=recipe.data.sequence_length,
            groups=groups,
        )
        if recipe.optim.qk_clip is not None:
            stack.enter_context(replaced(max_logits, "causal_max", _one_block))
            for module in (module for module in chunk.modules() if isinstance(module, MultiLatentAttention)):
                max_logits.watch_logits(module)
        first = sum(layers[:stage])
        make = Fp8Products if recipe.cluster.device == "cpu" else partial(_KernelProducts, memory=memory)
        layers_in_all = recipe.model.num_hidden_layers
        apply_fp8(chunk, recipe.precision.fp8, first_layer=first, layers=layers_in_all, make=make)
        yield _prepared(recipe, alone, chunk, stage, len(layers) - 1, memory)


def _smallest(layout: Layout) -> Layout:
    """Return the layout with nothing but the ranks that one rank computes together with."""
    dense, experts = layout.tp * layout.cp, layout.ep * layout.expert_tp
    stage = dense
    while stage % experts:
        stage += dense
    return Layout(layout.tp, layout.cp, stage // dense, 1, layout.ep, layout.expert_tp, stage // experts)


def _prepared(
    recipe: Recipe, layout: Layout, chunk: torch.nn.Module, stage: int, last: int, memory: LiveMemory
) -> FakeStage:
    length, rows = recipe.data.sequence_length // layout.cp, recipe.optim.micro_batch
    message = ((length // layout.tp, rows, recipe.model.hidden_size), parameter_dtype(recipe), torch.device("cpu"))
    runner = ModelStages({stage: chunk}, {}, last_stage=last, message=message, embedding_is_shared=False)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    batch = {
        "tokens": tokens,
        "position_ids": torch.arange(length).expand_as(tokens),
        "labels": tokens.clone(),
        "loss_mask": torch.ones(rows, length),
    }
    for parameter in (parameter for parameter in chunk.parameters() if parameter.requires_grad):
        parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(_into_the_buffer)
    nbytes = runner.empty_message().nbytes
    return FakeStage(runner, batch, memory, nbytes, chunk, stage == last)


def _into_the_buffer(parameter: torch.nn.Parameter) -> None:
    """Add a gradient to the buffer as soon as it exists, as data parallelism does in a run. None: that is deferred."""
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def _resolution(recipe: Recipe, layout: Layout) -> int:
    """Return a size below which a tensor makes no peak worth looking for: a hundredth of a message."""
    tokens = recipe.optim.micro_batch * recipe.data.sequence_length // (layout.cp * layout.tp)
    return tokens * recipe.model.hidden_size // 50


class _FakeMemory(LiveMemory):
    """Counts, and answers what fake tensors cannot."""

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Carry an operation out on fake tensors."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return False  # is there a NaN? did a random state change?
        if func is aten._grouped_mm.default and args[0].dtype is torch.float32:
            # Its shape rule knows BF16 only, though a CPU multiplies float32 (torch 2.13).
            return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).float()
        return func(*args, **kwargs)


# What a GPU does in one kernel each; the emulation goes through float32 copies there.
_KERNELS = (
    (dispatch, "_exchange_fp8"),
    (swiglu.SwiGLU, "forward"),
    (swiglu._FromCache, "backward"),
    (swiglu._FromInput, "backward"),
    (attention_cache.OutputCache, "keep"),
    (attention_cache._Saved, "restore"),
    (products, "add_product"),
    (products, "add_grouped_product"),
    (weight_gradients, "add_product"),
)


@contextmanager
def _as_one_kernel(owner: Any, name: str, memory: LiveMemory) -> Iterator[None]:
    """Let a function leave nothing but its results."""
    original = getattr(owner, name)

    @wraps(original)
    def kernel(*operands: Any) -> Any:
        with memory.as_one_kernel():
            return original(*operands)

    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    with replaced(owner, name, staticmethod(kernel) if static else kernel):
        yield


class _KernelProducts(Fp8Products):
    """Products that leave nothing but their results: the emulation's float32 operands are no GPU's."""

    def __init__(self, settings: Fp8Settings, memory: LiveMemory):
        super().__init__(settings)
        self._memory = memory

    def forward(self, *operands: Any, training: bool = True) -> Any:
        """Return Y and what is kept."""
        with self._memory.as_one_kernel():
            return super().forward(*operands, training=training)

    def input_gradient(self, *operands: Any) -> Any:
        """Return dX and what is kept of dY."""
        with self._memory.as_one_kernel():
            return super().input_gradient(*operands)

    def operand_for_weight_gradient(self, *operands: Any) -> Any:
        """Return what is kept of X from the backward on."""
        with self._memory.as_one_kernel():
            return super().operand_for_weight_gradient(*operands)

    def add_weight_gradient(self, *operands: Any) -> None:
        """Add dW to the buffer."""
        with self._memory.as_one_kernel():
            super().add_weight_gradient(*operands)


def _one_block(query: Tensor, key: Tensor) -> Tensor:
    """Hold one block of logits, in place of thousands of them one after the other."""
    length, _, heads, _ = query.shape
    rows, together = logit_block(length, heads)
    query.new_empty(together, rows, length, dtype=torch.float32)
    return query.new_empty(heads, dtype=torch.float32)


@contextmanager
def _small_integers_known() -> Iterator[None]:
    """Let fake tensors made from Python numbers keep them through arithmetic: row counts of experts become sizes.

    torch does so for single numbers (2.13: CONSTANT_NUMEL_LIMIT = 1)."""
    with replaced(fake_tensor, "CONSTANT_NUMEL_LIMIT", 4096):
        yield


@contextmanager
def _storages_not_copied() -> Iterator[None]:
    """Let copies between storages do nothing: recomputation restores a discarded output that way, there are no numbers
    to copy, and torch's fake tensors keep both storages alive for ever after it (2.13)."""
    with replaced(torch.UntypedStorage, "copy_", lambda storage, *source: storage):
        yield


@contextmanager
def _fused_leaves() -> Iterator[None]:
    """Attention and norms as a GPU's fused kernels keep them for backward."""

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value)

    with (
        replaced(attention, "_fused_attention", fused_attention),
        replaced(RMSNorm, "forward", lambda norm, x: _FusedNorm.apply(x, norm.weight)),
    ):
        yield


class _FusedAttention(torch.autograd.Function):
    """Keeps query, key, value, output and a float32 a row (arXiv 2205.14135 algorithm 2)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, _ = query.shape
        # Laid out as the kernels do, sequence before heads, so that what follows needs no copy.
        out = query.new_empty(rows, batch, heads, value.shape[-1]).permute(1, 2, 0, 3)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, rows, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _FusedNorm(torch.autograd.Function):
    """Keeps its input as it came and a float32 a row, as Transformer Engine's RMSNorm does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
