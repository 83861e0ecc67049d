"""Run by test_gpu_sides in a process of its own, on Transformer Engine's Python (python -m testing.te).

Builds the sides of the GPU benchmark at a tiny shape, takes steps, and prints losses and facts. Arguments: overrides of
the recipe.
"""

import json
import sys
import warnings

warnings.filterwarnings("ignore")
import torch

from benchmarks import gpu_sides, work
from benchmarks.plain_megatron import megatron
from launcher.command_line.compose import compose

BF16, FP8 = (*sys.argv[1:], "precision=bf16"), (*sys.argv[1:], "precision=fp8")


def three_steps(step, after=lambda: None):
    """Return the losses of three steps, and what the side says of itself; ``after`` is called after each."""
    losses = []
    for _ in range(3):
        losses.append(float(step()))
        after()
    return {"losses": losses, **step.facts}


torch.set_num_threads(1)
torch.manual_seed(1)
found = {"transformers": three_steps(work.transformers(BF16, dtype="bfloat16"))}

from dsv3_megatron.megatron.host import adapt_host  # on a GPU plain megatron-core runs without it

adapt_host()
from parallel.groups import stop_processes
from testing.te.calls import calls, forget

quantised, products, modules = [], set(), set()


def note():
    """Note what a step asked of the kernels."""
    quantised.append(len(calls("quantize", tile="128x128")))
    products.update(call["a"] for kind in ("gemm", "grouped_gemm") for call in calls(kind, layout="TN"))
    forget()


def note_module(module, given):
    """Note which modules ran."""
    modules.add(type(module).__name__)


torch.nn.modules.module.register_module_forward_pre_hook(note_module)
found["megatron"] = three_steps(megatron(compose(list(FP8)), "cpu"), note)
found |= {"quantised": quantised, "weights": sorted(products), "modules": sorted(modules)}
stop_processes()
found["stages"] = gpu_sides.stage_seconds((*BF16, "backend=te"), 3, "cpu")
print(json.dumps(found))
