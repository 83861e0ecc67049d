"""Recipe + world -> everything a rank trains with: groups, stage, gradient buffers, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_megatron.host import adapt_host
from dsv3_megatron.recipe import Recipe
from parallel.errors import LayoutError
from parallel.groups import build_groups
from parallel.layout import Layout
from parallel.world import World

adapt_host()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.backends import BackendSpecProvider  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig  # noqa: E402

from dsv3_megatron.model.backend import choose_backend  # noqa: E402
from dsv3_megatron.model.config import transformer_config  # noqa: E402
from dsv3_megatron.model.initialise import initialise  # noqa: E402
from dsv3_megatron.model.stage import balanced_stages, build_stage, keep_bias_in_float32  # noqa: E402
from dsv3_megatron.optim.optimizer import build_optimizer  # noqa: E402


@dataclass
class Parts:
    """What one rank trains with."""

    layout: Layout
    groups: ProcessGroupCollection
    device: torch.device
    backend: BackendSpecProvider
    config: MLATransformerConfig
    layers_of_stages: tuple[int, ...]
    module: GPTModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding's stage."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1


def choose_device(wanted: str, world: World) -> torch.device:
    """Return this rank's device. Raises LayoutError when a GPU is asked for and none is there."""
    present = torch.version.cuda is not None and torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise LayoutError("run.device = cuda, but torch finds no GPU here; set run.device=cpu")
    if wanted == "cpu" or not present:
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank)


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the weights that forward reads."""
    return torch.bfloat16 if recipe.precision.parameters == "bf16" else torch.float32


def build_parts(recipe: Recipe, layout: Layout, device: torch.device) -> Parts:
    """Build this rank's stage, wrap it for gradient reduction, and make the optimizer.

    The default process group must exist. Weights are those of step 0, the same in every layout.
    """
    backend = choose_backend(recipe.backend, device)
    if backend.name == "torch" and device.type == "cpu":
        use_our_adamw()
    groups = build_groups(layout)
    model_parallel_cuda_manual_seed(recipe.run.seed, te_rng_tracker=False)
    MTPLossLoggingHelper.tracker.clear()  # global, and sized by the first model of the process (--multirun has several)
    stages = recipe.parallel.stages or balanced_stages(recipe.model, layout.pp)
    config = transformer_config(
        recipe.model, recipe.parallel, layout, dtype=parameter_dtype(recipe), layers_of_stages=stages
    )
    stage = groups.pp.rank()
    module = build_stage(
        config,
        recipe.model,
        backend,
        stage=stage,
        layers_of_stages=stages,
        sequence_length=recipe.data.sequence_length,
        groups=groups,
    )
    module.to(device)
    std = recipe.model.initializer_range
    initialise(module, first_layer=sum(stages[:stage]), std=std, seed=recipe.run.seed, groups=groups)
    keep_bias_in_float32(module)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        ),
        module,
        pg_collection=groups,
    )
    optimizer = build_optimizer([ddp], recipe.optim, recipe.precision, groups)
    return Parts(layout, groups, device, backend, config, stages, module, ddp, optimizer)


def use_our_adamw() -> None:
    """Let megatron-core use our AdamW where it would use TE's or Apex's: neither is installed here.

    It decides by names bound at import (0.16.1); can go when the optimizer class is an argument.
    """
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed

    from dsv3_megatron.optim.adamw import FusedAdam

    optimizers.Adam = distributed.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    optimizers.is_te_min_version = lambda *a, **k: False
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True
