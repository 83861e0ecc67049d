"""How fast is a rank's share kept in memory, copied to another rank, and compared again at a restart?

Two ranks of this machine, over loopback: the copies are as fast as two processes with their checksums are, not as a
fabric. Every rank keeps a share of so many MiB, sends it, and takes the other's, as a save does; then reads its own
and compares it, as a start does. The best of some repeats of each.

python -m benchmarks.memory_copies [mebibytes=512] [repeats=3] [output=FILE.json]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.memory.share import write
from dsv3_megatron.checkpoint.memory.transfer import exchange
from dsv3_megatron.checkpoint.write import Staging
from dsv3_megatron.pipeline.saved import Entry
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks

PIECE = 1 << 24  # numbers of a piece, as in checkpoints
PROGRESS = {"step": 1, "tokens": 1, "samples": 1, "skipped": 0}
FACTS: dict[str, Any] = {"layout": {}, "extra": [], "optimizer": True, "updates": 1}


def measure(case: tuple[str, int, int]) -> dict[str, float]:
    """Return the seconds of each part on this rank."""
    folder, mebibytes, repeats = Path(case[0]), case[1], case[2]
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    group = dist.new_group(backend="gloo")
    numbers = [torch.randn(PIECE) for _ in range(max(1, mebibytes * (1 << 20) // (4 * PIECE)))]
    entries = [Entry(f"x{n}", tuple(each.shape), (0,), each) for n, each in enumerate(numbers)]
    memory = {"run": "r", "life": "0" * 8, "rank": world.rank, "world": world.size, "cut": "c"}
    own, copy = folder / f"own{world.rank}", folder / f"copy{world.rank}"
    best: dict[str, float] = {}

    def timed(name: str, action: Callable[..., Any], *given: Any) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = action(*given)
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        return result

    staging = Staging()
    for _ in range(repeats + 1):  # the first makes connections, and takes memory
        files = timed("copy_seconds", lambda: staging.files_of({"weights": entries}, world.rank, copy=True))
        share = timed("keep_seconds", write, own, files, "", PROGRESS, FACTS, memory)
        done = timed("exchange_seconds", exchange, group, share, 1 - world.rank, copy, 1 - world.rank)
        assert done.received is not None, done
        assert timed("compare_seconds", done.received.damage) is None
    stop_processes()
    return {**best, "bytes": sum(facts["bytes"] for facts in share.files.values())}


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    given = dict(argument.split("=", 1) for argument in arguments)
    mebibytes, repeats = int(given.get("mebibytes", 512)), int(given.get("repeats", 3))
    folder = tempfile.mkdtemp(dir="/dev/shm")
    try:
        (ranks,) = run_ranks(2, measure, [(folder, mebibytes, repeats)])
    finally:
        shutil.rmtree(folder)
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    rates = {
        name.removesuffix("_seconds"): slowest["bytes"] / seconds / 1e9
        for name, seconds in slowest.items()
        if name.endswith("_seconds")
    }
    found = {
        "share_bytes": slowest["bytes"],
        "gigabytes_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "cpus": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "command": f"python -m benchmarks.memory_copies mebibytes={mebibytes} repeats={repeats}",
    }
    print(json.dumps(found, indent=1))
    output = Path(given.get("output", Path(__file__).parent / "results" / "memory_copies.json"))
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
