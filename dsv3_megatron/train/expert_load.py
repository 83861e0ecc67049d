"""The experts' loads of a step: gathered from the routers of this rank's stages, for the bias update and the metrics.

Legend: L MoE layers of the model, those of the multi-token-prediction modules last; E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.routing.bias import update_expert_bias
from dsv3_megatron.routing.capacity import CapacityRouter
from dsv3_megatron.routing.router import SequenceBalancedRouter

RUNNING = 0.99  # the loads of about the last hundred steps, over which the paper of loss-free balancing smooths too
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")


def routers(parts: Parts) -> dict[int, SequenceBalancedRouter]:
    """Return this rank's routers by the number of their MoE layer in the model."""
    model, found = parts.recipe.model, {}
    for stage, chunk in parts.chunks.items():
        for name, module in chunk.named_modules():
            if isinstance(module, SequenceBalancedRouter):
                match = _LAYER.search(name)
                assert match is not None, f"{name} is a router outside the layers"
                kind, number = match.groups()
                before = model.num_moe_layers if kind == "mtp" else parts.first_layer(stage)
                found[before + int(number) - (0 if kind == "mtp" else model.first_k_dense_replace)] = module
    return found


@torch.no_grad()
def step_loads(parts: Parts) -> dict[int, Tensor]:
    """Return tokens per expert [E] of the whole step by MoE layer of this rank, and start counting anew."""
    counting = {n: r for n, r in routers(parts).items() if r.local_tokens_per_expert is not None}
    if not counting:
        return {}
    loads = torch.stack([r.local_tokens_per_expert for r in counting.values()])
    for router in counting.values():
        router.local_tokens_per_expert.zero_()
    # Every rank of the stage routes tokens of its own: TP by sequence parallelism, CP, DP (DualPipe: both mirrors).
    dist.all_reduce(loads, group=parts.groups.dp_cp)
    dist.all_reduce(loads, group=parts.groups.tp)
    return dict(zip(counting, loads))


@torch.no_grad()
def update_biases(parts: Parts, loads: dict[int, Tensor], speed: float) -> None:
    """Make overloaded experts less attractive, underloaded ones more; frozen routers stay as they are."""
    for number, router in routers(parts).items():
        if router.expert_bias is not None and not router.bias_is_frozen:
            router.expert_bias.copy_(update_expert_bias(router.expert_bias, loads[number], speed=speed))


def gather_loads(
    parts: Parts, loads: dict[int, Tensor], facts: Sequence[float]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return, on every rank, the loads of the whole model and every rank's ``facts``: one exchange, one wait.

    Args:
        facts: numbers of this rank, such as the bytes it has held; as many on every rank.
    Returns: [L, E] float64, None where no router counts; [facts, ranks] float64.
    """
    model = parts.recipe.model
    layers = model.num_moe_layers + (model.num_nextn_predict_layers if model.num_moe_layers else 0)
    size, ranks = layers * (model.n_routed_experts + 1), dist.get_world_size()
    both = torch.zeros(size + len(facts) * ranks, dtype=torch.float64, device=parts.device)
    table, of_ranks = both[:size].view(layers, model.n_routed_experts + 1), both[size:].view(len(facts), ranks)
    for number, load in loads.items():
        table[number, :-1] = load
        table[number, -1:] = 1  # so many ranks hold this layer; a slice is filled, one number is copied from the host
    for row, fact in zip(of_ranks, facts):
        row[dist.get_rank() : dist.get_rank() + 1] = fact
    dist.all_reduce(both)
    found = both.cpu().numpy()
    rows = found[:size].reshape(table.shape)
    whole = rows[:, :-1] / rows[:, -1:] if layers and (rows[:, -1] > 0).all() else None
    return whole, found[size:].reshape(len(facts), ranks)


@torch.no_grad()
def step_overflow(parts: Parts) -> tuple[int, int] | None:
    """Return the choices (rerouted, dropped) of the whole step in all layers; None where experts have no capacity."""
    if parts.recipe.model.topk_method != "capacity":
        return None
    total = torch.zeros(3, dtype=torch.float64, device=parts.device)
    for router in routers(parts).values():
        assert isinstance(router, CapacityRouter)
        total += router.overflow
        router.overflow.zero_()
    dist.all_reduce(total)  # no TP, no CP with capacity: every rank's microbatches and layers are its own
    return round(total[0].item()), round(total[1].item())


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """Return MaxVio of each layer: how far the busiest expert is above the mean load, as a share of the mean.

    Args:
        tokens_per_expert: [..., E] tokens of a batch; leading dimensions are layers.
    Returns: [...] float64; 0 when all experts have the same load.
    Source: arXiv 2408.15664 section 4.1.
    """
    load = tokens_per_expert.double()
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-12)


class RunningLoads:
    """Loads averaged over the last steps, each step's share of tokens fading by 1% a step.

    MaxVio of a batch mixes imbalance with chance; of the running loads only what persists is left. Begins anew in a
    resumed run: it is a measure, not a state.
    """

    def __init__(self) -> None:
        self._loads: Tensor | None = None

    def update(self, loads: Tensor) -> Tensor:
        """Add a step's loads [..., E] and return the running ones, in shares of the layer's tokens."""
        shares = loads.double() / loads.double().sum(-1, keepdim=True).clamp(min=1)
        self._loads = shares if self._loads is None else torch.lerp(shares, self._loads, RUNNING)
        return self._loads
