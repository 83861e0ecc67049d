"""The whole model of a recipe, of any size, without memory: real modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dsv3_megatron.megatron.cpu import virtual_device
from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")  # on a machine with GPUs too: nothing here computes

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.checkpoint.shares import model_state
from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.fp8 import apply_fp8
from dsv3_megatron.model.stage import build_stage
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.build import parameter_dtype
from parallel.groups import build_groups, start_processes, stop_processes
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from parallel.world import World


@contextmanager
def meta_model(recipe: Recipe) -> Iterator[torch.nn.Module]:
    """Build the model as one stage for as long as the block lasts, products as the recipe's precision says."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # after adapt_host

    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        groups = build_groups(Layout())
        model_parallel_cuda_manual_seed(recipe.run.seed, te_rng_tracker=False)
        layers = recipe.model.num_hidden_layers
        with virtual_device(torch.device("meta")):
            config = transformer_config(recipe.model, ParallelSettings(), Layout(), dtype=parameter_dtype(recipe))
            chunk = build_stage(
                config,
                recipe.model,
                TorchBackend(),
                stage=0,
                layers_of_stages=(layers,),
                sequence_length=recipe.data.sequence_length,
                groups=groups,
            )
        apply_fp8(chunk, recipe.precision.fp8, first_layer=0, layers=layers)
        yield chunk
    finally:
        stop_processes()


def parameters_in_checkpoints(recipe: Recipe) -> list[tuple[str, tuple[int, ...], bool]]:
    """Return name and whole shape of every parameter as checkpoints have them, and whether it is trained."""
    found = []
    with meta_model(recipe) as model:
        for value in model_state({0: model}, ProcessGroupCollection.use_mpu_process_groups()):
            if isinstance(value.data, torch.nn.Parameter):
                one = next(iter(nested_values([value.build()]))) if isinstance(value, ShardedTensorFactory) else value
                found.append((one.key, tuple(one.global_shape), value.data.requires_grad))
    return found
