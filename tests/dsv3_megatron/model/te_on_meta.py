"""Run by test_te_backend in a process of its own, with the stand-in for Transformer Engine on the path."""

import collections
import json
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
import transformer_engine.pytorch as te

from dsv3_megatron.host import adapt_host, virtual_device

adapt_host()
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dsv3_megatron.model.backend import make_te_backend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.stage import build_stage
from launcher.compose import compose
from parallel.groups import build_groups, start_processes, stop_processes
from parallel.layout import Layout
from parallel.world import World

recipe = compose([f"recipe={sys.argv[1]}"])
start_processes(World(0, 1, 0), torch.device("cpu"))
groups = build_groups(Layout())
model_parallel_cuda_manual_seed(1, te_rng_tracker=False)
layers = recipe.model.num_hidden_layers
with virtual_device(torch.device("meta")):
    config = transformer_config(recipe.model, recipe.parallel, Layout(), dtype=torch.bfloat16)
    module = build_stage(
        config,
        recipe.model,
        make_te_backend(),
        stage=0,
        layers_of_stages=(layers,),
        sequence_length=4096,
        groups=groups,
    )
mtp = sum(p.numel() for name, p in module.named_parameters() if name.startswith("mtp."))
print(
    json.dumps(
        {
            "main": sum(p.numel() for p in module.parameters()) - mtp,
            "mtp": mtp,
            "calls": collections.Counter(name for name, _ in te.CALLS),
            "expert_allreduce": [
                p.allreduce for n, p in module.named_parameters() if ".experts." in n and ".shared_experts." not in n
            ][:1],
            # MLA builds its attention after the base class built one it replaces: the last is the one that stays.
            "attention": [a for name, a in te.CALLS if name == "TEDotProductAttention"][-1]["kv_channels"],
        }
    )
)
stop_processes()
