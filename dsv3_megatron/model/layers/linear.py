"""Linear layers of the torch backend, whose weight gradient can be computed apart from the input gradient.

How they multiply - in the dtype of their operands or in emulated FP8 - is their ``products`` (precision/products.py).

With ``config.delay_wgrad_compute`` the backward of a layer computes the input gradient and queues what the weight
gradient needs; ``backward_dw()`` takes the oldest entry and adds to the weight's gradient. That split is what zero-
bubble schedules and DualPipe live on (arXiv 2401.10241, arXiv 2412.19437 section 3.2.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as MegatronRowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from dsv3_megatron.precision.products import HIGH_PRECISION, Products
from dsv3_megatron.precision.saved import SavedOperand, saved_of
from dsv3_megatron.precision.weight_gradients import accumulate


class WeightGradients:
    """The weight gradients a module has not computed yet: a queue, oldest microbatch first."""

    def __init__(self) -> None:
        self._deferred: deque[tuple[Tensor, Callable[[Tensor], None]]] = deque()

    def __len__(self) -> int:
        return len(self._deferred)

    def defer(self, weight: Tensor, add: Callable[[Tensor], None]) -> None:
        """Queue a weight gradient; ``add`` adds it to a float32 tensor of the weight's shape."""
        self._deferred.append((weight, add))

    def run_oldest(self) -> None:
        """Compute the oldest gradient and add it where the optimizer looks."""
        accumulate(*self._deferred.popleft())


@dataclass(frozen=True)
class Wiring:
    """What a layer's product does besides multiplying.

    ``gather``: x is a rank's share of the sequence and is gathered over ``group`` first; the input gradient is
    reduce-scattered. ``reduce``: the input gradient is summed over ``group``. ``later``: the weight gradient is only
    queued, for ``backward_dw``; else it is computed in backward. ``training``: as the module's. ``rows``: of each
    expert, where W is a stack of experts.
    """

    weight_gradients: WeightGradients
    later: bool
    training: bool
    group: dist.ProcessGroup | None = None
    gather: bool = False
    reduce: bool = False
    rows: Sequence[int] | None = None


class SeparableProduct(torch.autograd.Function):
    """X W^T whose backward returns the input gradient and computes or queues the weight gradient, unless the weight is
    frozen."""

    @staticmethod
    def forward(
        ctx: object,
        x: Tensor,
        weight: Tensor,
        products: Products,
        wiring: Wiring,
        ends: Tensor | None,
        kept: SavedOperand | None,
    ) -> Tensor:
        whole = _gather_sequence(x, wiring.group) if wiring.gather else x
        y, ctx.saved = products.forward(whole, weight, ends, None if wiring.gather else kept, training=wiring.training)
        # What is gathered is not kept where it can be gathered again: a rank's share is.
        ctx.gathers_again = wiring.gather and not wiring.later and products is HIGH_PRECISION
        if not ctx.needs_input_grad[1]:
            ctx.saved = None
        elif ctx.gathers_again:
            ctx.saved = x
        ctx.weight, ctx.products, ctx.wiring, ctx.ends = weight, products, wiring, ends
        return y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, products, wiring, ends, saved = ctx.weight, ctx.products, ctx.wiring, ctx.ends, ctx.saved
        ctx.saved = None  # freed when the weight gradient is paid, not when the graph goes
        grad = grad.contiguous()  # grouped products refuse the zero strides of an expanded gradient
        grad_x, dy = products.input_gradient(grad, weight, ends)
        if ctx.needs_input_grad[1]:
            x = products.operand_for_weight_gradient(
                _gather_sequence(saved, wiring.group) if ctx.gathers_again else saved, ends
            )
            wiring.weight_gradients.defer(
                weight, lambda total: products.add_weight_gradient(total, dy, x, ends, wiring.rows)
            )
            if not wiring.later:
                wiring.weight_gradients.run_oldest()
        if wiring.gather:
            share = grad_x.new_empty((grad_x.shape[0] // wiring.group.size(), *grad_x.shape[1:]))
            dist.reduce_scatter_tensor(share, grad_x.contiguous(), group=wiring.group)
            grad_x = share
        elif wiring.reduce:
            dist.all_reduce(grad_x, group=wiring.group)
        return grad_x, None, None, None, None, None


def separable_product(x: Tensor, weight: Tensor, products: Products, wiring: Wiring, ends: Tensor | None) -> Tensor:
    """Return X W^T with a backward that can be split; uses what other modules keep of x (precision/saved.py)."""
    return SeparableProduct.apply(x, weight, products, wiring, ends, saved_of(x))


def _gather_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    assert group is not None, "a sequence is gathered over a group"
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


class _Separable:
    """What column- and row-parallel layers share: the choice of product, and ``backward_dw``."""

    products: Products = HIGH_PRECISION
    can_wait = True  # whether a schedule may leave the weight gradient to a W

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        later = self.can_wait and self.config.delay_wgrad_compute
        if not torch.is_grad_enabled() and self.products is HIGH_PRECISION:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]  # of the layer mixed in
        if not hasattr(self, "weight_gradients"):
            self.weight_gradients = WeightGradients()
        gather, reduce = kwargs.get("sequence_parallel", False), kwargs.get("allreduce_dgrad", False)
        wiring = Wiring(self.weight_gradients, later, self.training, self.tp_group, gather, reduce)
        return separable_product(input, weight, self.products, wiring, None)

    def backward_dw(self) -> None:
        """Compute the oldest weight gradient deferred, if there is one."""
        if getattr(self, "weight_gradients", None):
            self.weight_gradients.run_oldest()


class ColumnParallelLinear(_Separable, MegatronColumnParallelLinear):
    """Y = X W^T with the rows of W over TP ranks."""


class RowParallelLinear(_Separable, MegatronRowParallelLinear):
    """Y = X W^T with the columns of W over TP ranks."""


class OutputHead(ColumnParallelLinear):
    """The output head. Its weight gradient belongs to every backward: no schedule counts on leaving it to a W."""

    can_wait = False


class DuplicatedLinear(torch.nn.Module):
    """Y = X W^T with the whole W on every TP rank, each working on its share of the sequence.

    MLA's down-projections: their output is a latent shared by all heads, so splitting it over TP would need it
    gathered again. (megatron-core's spec without TE splits and gathers them, and the gradient of the shared RoPE key
    is then wrong above TP 1; this is what TE's ``parallel_mode="duplicated"`` does.)
    """

    products: Products = HIGH_PRECISION

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: object,
        init_method: Callable[[Tensor], None],
        **unused: object,
    ):
        super().__init__()
        self.tp_group = None  # megatron-core names none for a duplicated layer; model.stage.build_stage sets it
        self.config = config
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over TP
        self.weight_gradients = WeightGradients()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return ([..., output_size], no bias) from [..., input_size]."""
        later = self.config.delay_wgrad_compute
        if self.products is HIGH_PRECISION and not torch.is_grad_enabled():
            return torch.nn.functional.linear(x, self.weight), None
        wiring = Wiring(self.weight_gradients, later, self.training)
        return separable_product(x, self.weight, self.products, wiring, None), None

    def backward_dw(self) -> None:
        """Compute the oldest weight gradient deferred, if there is one."""
        if self.weight_gradients:
            self.weight_gradients.run_oldest()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Return the weight as one tensor that every TP rank holds whole."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
