"""Routed experts of the torch backend: all local experts in one grouped product.

Legend: T tokens sent to this rank's experts, sorted by expert; E local experts; I, O input and output width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor

from dsv3_megatron.model.layers.linear import WeightGradients, Wiring, separable_product
from dsv3_megatron.model.layers.swiglu import give_back
from dsv3_megatron.precision.products import HIGH_PRECISION, Products
from parallel.device import to_device


class GroupedExperts(TEGroupedMLP):
    """megatron-core's grouped experts over our grouped linear layers and SwiGLU."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Return ([T, D], no bias) from tokens [T, D] sorted by expert, counts [E] and router weights [T].

        megatron-core's own multiplies by the weights after its activation, which then keeps its output for backward;
        our SwiGLU takes them in, so that it need not.
        """
        counts = tokens_per_expert.tolist()
        ends = _ends(counts, permuted_local_hidden_states.device)
        gate_up, _ = self.linear_fc1(permuted_local_hidden_states, counts, ends)
        probs = permuted_probs.unsqueeze(-1)
        if not self.recomputes_activation:
            return self.linear_fc2(self.activation_func(gate_up, probs), counts, ends)
        recomputed = CheckpointWithoutOutput()
        output, _ = self.linear_fc2(recomputed.checkpoint(self.activation_func, gate_up, probs), counts, ends)
        recomputed.discard_output_and_register_recompute(output)
        return output, None

    @property
    def recomputes_activation(self) -> bool:
        """Whether SwiGLU's output is discarded and computed again. What is cached in FP8 is computed again from there
        anyway: recomputing from a BF16 copy would only keep more."""
        return self.activation_recompute and not self.activation_func.cache_in_fp8

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Return both weights under the keys, and in the global shapes, that TE's grouped layers use.

        A checkpoint therefore loads on either backend and at any EP.
        """
        found = {}
        for name in ("linear_fc1", "linear_fc2"):
            key = f"{prefix}experts.{name}.weight"
            found[f"{prefix}{name}.weight"] = getattr(self, name).sharded_weight(key, sharded_offsets)
        return found


class TEGroupedExperts(TEGroupedMLP):
    """megatron-core's grouped experts on Transformer Engine, whose SwiGLU keeps its input in FP8 where the policy asks.

    TE's second layer keeps a copy of its input; here it is told to keep the input itself, whose memory is given back
    after the forward and filled again from SwiGLU's cache before the backward (arXiv 2412.19437 section 3.3.3).
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Return ([T, D], no bias) from tokens [T, D] sorted by expert, counts [E] and router weights [T]."""
        if not self.activation_func.cache_in_fp8 or not torch.is_grad_enabled():
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        x, padded = self.quantization_padding(permuted_local_hidden_states, counts)
        probs, _ = self.quantization_padding(permuted_probs.unsqueeze(-1), counts)
        gate_up, _ = self.linear_fc1(x, padded)
        activated = self.activation_func(gate_up, probs)
        self.linear_fc2.save_original_input = True
        output, _ = self.linear_fc2(activated, padded)
        give_back(activated, output)
        return self.quantization_unpadding(output, counts), None


class GroupedLinear(torch.nn.Module):
    """E linear layers as one parameter [E, O, I] and one product.

    Stacked, because grouped_mm wants its operands in one block of memory, and stacking E parameters in each forward
    would copy every expert for every microbatch.
    """

    tensor_parallel_dim: int  # the dimension of [E, O, I] that expert-TP ranks share
    products: Products = HIGH_PRECISION
    gated = False  # True where O is two matrices [gate; up], each of which is sharded over expert-TP

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: object,
        init_method: Callable[[Tensor], None],
        pg_collection: object,
        **unused: object,
    ):
        super().__init__()
        self.config = config
        self.expert_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        sizes = [num_gemms, output_size, input_size]
        sizes[self.tensor_parallel_dim] //= self.tp_group.size()
        self.weight = torch.nn.Parameter(
            torch.empty(sizes, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        if config.perform_initialization:
            for expert in self.weight.unbind():
                init_method(expert)
        # Experts are reduced over the expert-data-parallel group at every EP, also at EP 1. megatron-core marks them
        # only above EP 1, and then TP ranks that saw different tokens never sum their gradients.
        self.weight.allreduce = False
        # Ranks of the expert-data-parallel group hold different shards of the gradient, so each counts in its norm.
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = self.tensor_parallel_dim
        self.weight.partition_stride = 1
        self.weight_gradients = WeightGradients()

    def forward(self, x: Tensor, tokens_per_expert: list[int], ends: Tensor | None = None) -> tuple[Tensor, None]:
        """Return ([T, O], no bias) from [T, I]; the first ``tokens_per_expert[0]`` rows belong to expert 0.

        ``ends`` [E] int32: the sums of ``tokens_per_expert`` so far, on x's device; made from it where None.
        """
        ends = _ends(tokens_per_expert, x.device) if ends is None else ends
        wiring = Wiring(
            self.weight_gradients, self.config.delay_wgrad_compute, self.training, rows=tuple(tokens_per_expert)
        )
        if torch.is_grad_enabled() or self.products is not HIGH_PRECISION:
            return separable_product(x, self.weight, self.products, wiring, ends), None
        return self.products.forward(x, self.weight, ends)[0], None

    def backward_dw(self) -> None:
        """Compute the oldest weight gradient deferred, if there is one."""
        if self.weight_gradients:
            self.weight_gradients.run_oldest()

    def sharded_weight(self, key: str, sharded_offsets: tuple) -> ShardedTensor | ShardedTensorFactory:
        """Return the weight as this rank's box of the global [all experts, O, I]."""
        axes = len(sharded_offsets)
        expert = (axes, self.expert_group.rank(), self.expert_group.size())
        size, rank = self.tp_group.size(), self.tp_group.rank()
        axis = axes + self.tensor_parallel_dim
        # Last number 0 on one rank of the expert-data-parallel group: that one saves.
        replica = (0, 0, self.dp_group.rank())

        def box(data: Tensor, part: int, parts: int, replica_id: ReplicaId) -> ShardedTensor:
            offsets = (*sharded_offsets, expert, (axis, part, parts))
            return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica_id, prepend_axis_num=axes)

        if not self.gated:
            return box(self.weight, rank, size, replica)

        def split(name: str, data: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
            halves = data.chunk(2, dim=self.tensor_parallel_dim)
            boxes = [box(half, rank + i * size, 2 * size, replica_id) for i, half in enumerate(halves)]
            for part in boxes:  # the optimizer asks for its states under names of its own
                part.key = name
            return boxes

        def join(halves: list[Tensor]) -> Tensor:
            with torch.no_grad():
                return torch.cat(halves, dim=self.tensor_parallel_dim)

        return ShardedTensorFactory(key, self.weight, split, join, replica)


class GateUpLinear(GroupedLinear):
    """First layer of the experts: [T, D] -> [T, gate | up]."""

    tensor_parallel_dim = 1
    gated = True


class DownLinear(GroupedLinear):
    """Second layer of the experts: [T, I] -> [T, D]. Above expert-TP 1 the output is a partial sum, which the token
    dispatcher reduces."""

    tensor_parallel_dim = 2


def _ends(tokens_per_expert: list[int], device: torch.device) -> Tensor:
    """Return where each expert's rows end: [E] int32, as grouped_mm wants it."""
    return to_device(torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32), device)
