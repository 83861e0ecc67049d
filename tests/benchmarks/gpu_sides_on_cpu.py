"""Run by test_gpu_sides in a process of its own, with the stand-in for Transformer Engine on the path.

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
from launcher.compose import compose

BF16, FP8 = (*sys.argv[1:], "precision=bf16"), (*sys.argv[1:], "precision=fp8")


def three_steps(step):
    """Return the losses of three steps, and what the side says of itself."""
    return {"losses": [float(step()) for _ in range(3)], **step.facts}


torch.set_num_threads(1)
torch.manual_seed(1)
found = {"transformers": three_steps(work.transformers(BF16, dtype="bfloat16"))}

from dsv3_megatron.host import adapt_host  # on a GPU plain megatron-core runs without it

adapt_host()
import transformer_engine.pytorch as te

from dsv3_megatron.optim.adamw import FusedAdam
from dsv3_megatron.optim.optimizer import use_our_adamw
from parallel.groups import stop_processes


class Adam(FusedAdam):
    """Our AdamW in the place of TE's, which the stand-in has not; megatron-core looks at its arguments."""

    def __init__(self, *given, master_weight_dtype=None, exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32,
                 use_decoupled_grad=False, **others):  # fmt: skip
        moments = {"exp_avg_dtype": exp_avg_dtype, "exp_avg_sq_dtype": exp_avg_sq_dtype}
        super().__init__(*given, use_decoupled_grad=use_decoupled_grad, **moments, **others)


def make_drawn(module, name, shape, arguments, make=te._Module._make):
    """TE draws its weights; the stand-in leaves them as they are."""
    make(module, name, shape, arguments)
    weight = getattr(module, name)
    torch.nn.init.normal_(weight, std=0.02) if len(shape) > 1 else torch.nn.init.ones_(weight)


use_our_adamw()
te.optimizers.FusedAdam, te._Module._make = Adam, make_drawn
found["megatron"] = three_steps(megatron(compose(list(FP8)), "cpu"))
found["recipes"] = sorted({str(recipe) for _, recipe in te.FORWARDS})
found["modules"] = sorted({name for name, _ in te.FORWARDS})
stop_processes()
found["stages"] = gpu_sides.stage_seconds((*BF16, "backend=torch"), 3, "cpu")
print(json.dumps(found))
