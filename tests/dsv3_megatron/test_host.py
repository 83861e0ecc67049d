"""What a run on a CPU leaves alone: compilers it does not use, collectives with nobody to exchange with."""

import json
import subprocess
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from dsv3_megatron.build import build_parts
from dsv3_megatron.data.samples import Synthetic, step_batches
from dsv3_megatron.step import train_step
from launcher.compose import compose
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from tests.ranks import run_ranks
from tests.tiny import SMALL, VALUES


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


def collectives_of_a_step(overrides):
    torch.set_num_threads(1)
    recipe = compose([*SMALL, *overrides])
    world = World.from_environment()
    start_processes(world, torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        share = {"first": 0, "global_batch": 8, "micro_batch": 2, "dp_rank": world.rank, "dp": world.size}
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            train_step(parts, step_batches(Synthetic(recipe.model.vocab_size, 32, 1), **share), VALUES)
    finally:
        stop_processes()
    counts = {event.key: event.count for event in profiled.key_averages() if event.key.startswith("c10d::")}
    return sum(n for name, n in counts.items() if "reduce_scatter" in name)


def test_a_group_of_one_exchanges_nothing():
    ((alone,),) = run_ranks(1, collectives_of_a_step, [()])
    assert alone == 0
    ((shared, _),) = run_ranks(2, collectives_of_a_step, [()])
    assert shared > 0, "or the name above is not the collective's any more"
