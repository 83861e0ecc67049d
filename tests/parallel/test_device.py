"""Which device a process uses: chosen by the run, one GPU a rank, and the CPU of a machine that has GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.megatron import host
from parallel.errors import LayoutError
from parallel.groups import start_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import SMALL, Case, train_rank

ROOT = Path(__file__).resolve().parents[2]
THIRD = World(rank=11, size=16, local_rank=3)


def with_gpus(code):
    """Run code in a process in which torch says that there are eight GPUs; return what it prints last, from JSON."""
    code = f"import json\nfrom testing.with_gpus import say_there_are\nsay_there_are(8)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_on_the_cpu_leaves_the_gpus_of_the_machine_alone(tmp_path):
    words = [*SMALL, "run.device=cpu", "run.steps=2", f"run.directory={tmp_path / 'run'}"]
    found = with_gpus(
        "from launcher import evaluate, pretrain\n"
        f"assert pretrain.main({words!r}) == 0\n"
        f"assert evaluate.main(['run={tmp_path / 'run'}']) == 0\n"
    )
    assert found["step"] == 2 and found["held_out_loss"] > 0


def test_the_cpu_may_be_chosen_after_megatron_core_was_imported():
    found = with_gpus(
        "import dsv3_megatron.train.build\n"
        "from launcher import plan\n"
        "assert plan.main(['recipe=dsv3_tiny', 'show=precision']) == 0\n"
        "from testing.training.tiny import Case, train_rank\n"
        "norms = [result.grad_norm for result in train_rank(Case(steps=2))['results']]\n"
        "from torch._dynamo.utils import counters\n"
        "print(json.dumps({'norms': norms, 'compiled': counters['frames']['ok']}))\n"
    )
    ((early,),) = run_ranks(1, train_rank, [Case(steps=2)])
    assert found == {"norms": [result.grad_norm for result in early["results"]], "compiled": 0}


@pytest.fixture
def eight_gpus(monkeypatch):
    """A process prepared for GPUs, as far as choosing one goes."""
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setitem(host._state, "chosen", "cuda")


def test_a_rank_uses_the_gpu_of_its_local_rank(eight_gpus):
    for wanted in ("auto", "cuda"):
        assert host.choose_device(wanted, THIRD) == torch.device("cuda", 3)


def test_more_ranks_than_gpus_are_refused(eight_gpus, monkeypatch):
    ninth = World(rank=8, size=16, local_rank=8)
    with pytest.raises(LayoutError, match=r"LOCAL_RANK = 8, but torch sees 8 GPUs on this node; start at most 8"):
        host.choose_device("auto", ninth)
    monkeypatch.setitem(host._state, "chosen", "cpu")
    assert host.choose_device("auto", ninth) == torch.device("cpu")


def test_one_process_serves_one_kind_of_device(eight_gpus):
    with pytest.raises(LayoutError, match="run.device = cpu, but this process is prepared for cuda"):
        host.choose_device("cpu", THIRD)


def test_a_gpu_is_refused_where_none_is():
    with pytest.raises(LayoutError, match="torch finds no GPU here"):
        host.choose_device("cuda", World(0, 1, 0))


def test_the_gpu_is_the_current_one_before_groups_exist_and_they_are_not_bound_to_it(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: seen.append((args, kwargs)))
    start_processes(World(0, 1, 0), torch.device("cuda", 3))
    start_processes(World(0, 1, 0), torch.device("cpu"))
    device, ((backends,), how), (cpu_only, _) = seen
    assert device == torch.device("cuda", 3) and backends == "cpu:gloo,cuda:nccl" and cpu_only == ("gloo",)
    assert "device_id" not in how, "an eager communicator carries all pairs' messages on one stream"
