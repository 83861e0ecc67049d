"""Run by test_te_backend in a process of its own, with the stand-in for Transformer Engine on the path.

Trains two steps on the te backend and prints which modules ran under which FP8 recipe, and the losses. Arguments:
overrides of the recipe.
"""

import collections
import json
import sys
import warnings

warnings.filterwarnings("ignore")
import torch

from dsv3_megatron.host import adapt_host
from dsv3_megatron.precision.transformer_engine import check_environment, check_policy, prepare_environment
from launcher.compose import compose
from parallel.errors import UserError
from parallel.groups import start_processes, stop_processes
from parallel.world import World

TOLD = "--untold" not in sys.argv  # whether TE is told about scales before it is imported
recipe = compose([word for word in sys.argv[1:] if word != "--untold"])
if TOLD:
    prepare_environment(recipe.precision)
adapt_host()
import transformer_engine.pytorch as te

import dsv3_megatron.build as build
from dsv3_megatron.model.backend import TorchBackend, make_te_backend
from dsv3_megatron.optim.optimizer import use_our_adamw
from dsv3_megatron.step import StepValues, train_step

build.choose_backend = lambda wanted, device: TorchBackend() if wanted == "torch" else make_te_backend()
use_our_adamw()
torch.set_num_threads(1)
try:
    if recipe.precision.fp8:
        check_policy(recipe.precision.fp8)
        check_environment(recipe.precision.fp8)
except UserError as error:
    print(json.dumps({"refused": str(error)}))
    raise SystemExit(0) from None
start_processes(World(0, 1, 0), torch.device("cpu"))
parts = build.build_parts(recipe, recipe.layout(1), torch.device("cpu"))
tokens = torch.randint(0, recipe.model.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
batch = {
    "tokens": tokens[:, :-1],
    "labels": tokens[:, 1:],
    "loss_mask": torch.ones(2, 64),
    "position_ids": torch.arange(64).expand(2, 64),
}
te.FORWARDS.clear()
results = [train_step(parts, [batch] * 4, StepValues(1e-3, 0.3, 0.01, 1e-4)) for _ in range(2)]
forwards = collections.Counter(te.FORWARDS)
print(
    json.dumps(
        {
            "losses": [result.lm_loss for result in results],
            "forwards": [[name, recipe, count] for (name, recipe), count in sorted(forwards.items(), key=str)],
            "inits": te.INITS[:1],
            "dispatchers": sorted({type(m.token_dispatcher).__name__ for c in parts.chunks.values()
                                   for m in c.modules() if hasattr(m, "token_dispatcher")}),
        }
    )
)  # fmt: skip
stop_processes()
