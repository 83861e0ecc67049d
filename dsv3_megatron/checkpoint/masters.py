"""The optimizer's float32 weights (masters) and the weights that forward reads, one from the other after loading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that megatron-core chains, one for experts and one for the rest, or the only one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@torch.no_grad()
def weights_from_masters(optimizer: MegatronOptimizer, ddps: Iterable[DistributedDataParallel]) -> None:
    """Make the weights what the masters are in their format, as the end of a step does. Collective.

    For a checkpoint of a run in the same format that changes nothing. One whose weights were held in FP8 stores what
    is left of them, exactly so only where scales are powers of two: the next step reads neither from there.
    """
    for part in parts_of(optimizer):
        if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            part._copy_main_params_to_model_params()
            continue
        for weight in (weight for group in part.param_groups for weight in group["params"]):
            weight.data.copy_(part.optimizer.get_unscaled_state(weight, "master_param"))
    for ddp in ddps:
        ddp.start_param_sync(force_sync=True)


def masters_from_weights(optimizer: MegatronOptimizer, loaded: dict[torch.nn.Parameter, Tensor]) -> None:
    """Let the masters begin with the weights that were loaded, not with what FP8 has left of them.

    ``loaded``: what a checkpoint says of every parameter of this rank. Moments begin at zero.
    """
    for part in parts_of(optimizer):
        if any(map(is_float8tensor, _weights(part))):
            # megatron-core finds a weight in what was loaded by a part of its name, and ``weight1`` in ``weight10``.
            part._build_model_param_to_state_dict_param_map = lambda given: given
            part.reload_model_params(loaded)
            del part._build_model_param_to_state_dict_param_map
        else:
            part.reload_model_params()


def _weights(part: Any) -> Iterator[Tensor]:
    for groups in (part.model_float16_groups, part.model_fp32_groups):
        for group in groups:
            yield from group
