"""What a run on a CPU leaves alone: compilers it does not use, collectives with nobody to exchange with."""

import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.data.source.samples import Synthetic, step_batches
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import SMALL, VALUES, small_recipe


def test_a_run_compiles_nothing(tmp_path):
    words = [*SMALL, "run.steps=1", "parallel.recompute=[norm]", f"run.directory={tmp_path / 'run'}"]
    code = (
        "import sys, json, launcher.pretrain as pretrain\n"
        f"assert pretrain.main({words!r}) == 0\n"
        "print(json.dumps([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [], "a second of start-up for what is not used"


def counts_of_a_step(overrides):
    """Return how often a training step reduces and scatters, and how often it joins the chunks of eight experts."""
    torch.set_num_threads(1)
    recipe = small_recipe(*overrides)
    world = World.from_environment()
    start_processes(world, torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        share = {"first": 0, "global_batch": 8, "micro_batch": 2, "dp_rank": world.rank, "dp": world.size}
        batches = step_batches(Synthetic(recipe.model.vocab_size, 32, 1), **share)
        with profile(activities=[ProfilerActivity.CPU]) as profiled, Joined() as joined:
            train_step(parts, batches, VALUES)
    finally:
        stop_processes()
    reduced = sum(e.count for e in profiled.key_averages() if e.key.startswith("c10d::") and "reduce_scatter" in e.key)
    return {"reduce_scatter": reduced, "sorts": joined.count}


class Joined(TorchDispatchMode):
    """Counts tensors [tokens, hidden] joined from eight or more chunks."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.cat.default:
            self.count += len(args[0]) >= 8 and args[0][0].dim() == 2
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def counted():
    """What a step of one rank counts, and of a rank of two: data-parallel, expert-parallel."""
    ((alone,),) = run_ranks(1, counts_of_a_step, [()])
    (shared, _), (experts, _) = run_ranks(2, counts_of_a_step, [(), ("parallel.expert=2",)])
    return alone, shared, experts


def test_a_group_of_one_exchanges_nothing(counted):
    alone, shared, _ = counted
    assert alone["reduce_scatter"] == 0
    assert shared["reduce_scatter"] > 0, "or the name below is not the collective's any more"


def test_tokens_of_one_rank_are_not_sorted_again(counted):
    alone, _, one = counted
    layers, microbatches = 4, {"alone": 4, "EP 2": 2}
    # Eight chunks and more go into one tensor where tokens are sorted, forward and back, there and for their gradients.
    assert alone["sorts"] == 0
    assert one["sorts"] == 2 * 2 * layers * microbatches["EP 2"]
