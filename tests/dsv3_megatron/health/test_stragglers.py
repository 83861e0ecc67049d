"""The clock of attention blocks: what it counts, and that it holds no more after many steps than after few."""

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.health.stragglers import WorkClock
from parallel.groups import start_processes, stop_processes
from parallel.world import World


class _Block(torch.nn.Module):
    """A chunk with one attention block that takes ``seconds`` of the fake GPU."""

    def __init__(self, gpu):
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.self_attention = _Attention(gpu)

    def forward(self):
        return self.layer.self_attention(0)


class _Attention(torch.nn.Module):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def forward(self, x):
        self.gpu.queued += 1.0
        return x


class _Gpu:
    """Work is queued by the host and done later; events are as CUDA's: what is not recorded, or not passed, has no
    time."""

    def __init__(self):
        self.queued = self.done = 0.0
        self.events = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                gpu.events += 1
                self.at = None

            def record(self):
                self.at = gpu.queued

            def query(self):
                return self.at is None or self.at <= gpu.done

            def synchronize(self):
                gpu.done = max(gpu.done, self.at)

            def elapsed_time(self, other):
                assert self.at is not None and other.at is not None and other.at <= gpu.done, "not passed yet"
                return 1000 * (other.at - self.at)

        self.Event = Event


@pytest.fixture
def clock(monkeypatch):
    """A clock over a block on a fake GPU: (clock, block, GPU)."""
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    block = _Block(gpu)
    yield WorkClock([block], torch.device("cuda")), block, gpu


def test_events_do_not_pile_up_where_nobody_compares(clock):
    _, block, gpu = clock
    for behind in (3, 3, 1):  # the host runs so many blocks ahead
        for _ in range(50):
            block()
            gpu.done = gpu.queued - behind
    assert gpu.events <= 2 * 5


def test_every_block_of_training_counts_and_none_of_evaluation(clock, monkeypatch):
    work, block, gpu = clock
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        monkeypatch.setattr(work, "_device", torch.device("cpu"))
        seconds = []
        gather = dist.all_gather
        monkeypatch.setattr(dist, "all_gather", lambda out, mine: (seconds.append(mine.item()), gather(out, mine)))
        for _ in range(3):
            block()
        block.eval()
        gpu.queued += 100.0
        block()
        block.train()
        block()
        assert work._calls == 0, "the GPU has passed none"
        assert work.compare().rank == 0
        for _ in range(2):
            block()
        work.compare()
        assert seconds == [1.0, 1.0] and work._calls == 0
    finally:
        stop_processes()
