"""Does the engine take the time that the simulator says, and is it as fast as torch's and megatron-core's runtimes?

    python -m benchmarks.schedule_fidelity [output=FILE]

Eight processes over gloo run stages that sleep 20 ms per forward, input gradient and weight gradient: no arithmetic, so
what is measured is the order of actions and the engine around them. Beside it the same sleeping stages under
torch.distributed.pipelining's schedules, in the same run, alternated; medians of five, a warm-up thrown away. A second
part runs stages that take no time at all: the cost of the engine per action, beside torch's and megatron-core's 1F1B.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist

from benchmarks.other_runtimes import megatrons, torchs
from benchmarks.sleeping import SleepingStages
from parallel.pipeline.engine import Engine
from parallel.pipeline.simulator import Times, simulate
from parallel.schedules import make_schedule

RANKS, SECONDS, REPEATS = 8, 0.02, 5
CASES = [("1f1b", 20, 1), ("interleaved", 24, 2), ("zb1p", 20, 1), ("dualpipe", 20, 1), ("dualpipev", 20, 1)]


def timed(run: Callable[[], None]) -> float:
    """Return how long ``run`` takes from a common start to the last rank's end, the median of several."""
    found = []
    for repeat in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        end = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(end, op=dist.ReduceOp.MAX)
        if repeat:
            found.append(end.item())
    return statistics.median(found)


def ours(name: str, many: int, chunks: int, seconds: float) -> Callable[[], None]:
    """Return a step of our engine."""
    schedule = make_schedule(name, RANKS, many, chunks)
    times = Times.of(schedule.stages, forward=seconds, input_grad=seconds, weight_grad=seconds)
    return Engine(schedule, dist.group.WORLD, SleepingStages(times, schedule.stages - 1)).run


def rank_main(rank: int, port: int, results: multiprocessing.Queue) -> None:
    """Measure everything on one rank; rank 0 reports."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    rows = []
    for name, many, chunks in CASES:
        schedule = make_schedule(name, RANKS, many, chunks)
        times = Times.of(schedule.stages, forward=SECONDS, input_grad=SECONDS, weight_grad=SECONDS)
        reference = torchs(name, many, chunks, SECONDS)
        row = {"schedule": name, "microbatches": many, "simulated": simulate(schedule, times).makespan}
        row["ours"] = timed(ours(name, many, chunks, SECONDS))
        row["torch"] = timed(reference) if reference else None
        rows.append(row)
    actions = len(make_schedule("1f1b", RANKS, 64).ranks[0])
    empty = {
        "ours": timed(ours("1f1b", 64, 1, 0.0)) / actions,
        "torch": timed(torchs("1f1b", 64, 1, 0.0)) / actions,
        "megatron-core": timed(megatrons(64)) / actions,
    }
    if rank == 0:
        results.put({"rows": rows, "seconds_per_action": empty})
    dist.barrier()
    dist.destroy_process_group()


def table(found: dict) -> str:
    """Return the results as a table."""
    lines = ["| schedule | microbatches | simulated s | ours s | ours / simulated | torch s | ours / torch |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        theirs = f"{row['torch']:.3f} | {row['ours'] / row['torch']:.3f}" if row["torch"] else "- | -"
        lines.append(
            f"| {row['schedule']} | {row['microbatches']} | {row['simulated']:.3f} | {row['ours']:.3f} | "
            f"{row['ours'] / row['simulated']:.3f} | {theirs} |"
        )
    per = found["seconds_per_action"]
    mine = per["ours"]
    costs = ", ".join(f"{name} {1e6 * s:.0f} us ({s / mine:.2f}x ours)" for name, s in per.items())
    return "\n".join([*lines, "", f"Empty stages, 1F1B, 64 microbatches, per action: {costs}"])


def main() -> None:
    """Start the ranks, print the table."""
    context, port = multiprocessing.get_context("fork"), 20000 + os.getpid() % 9000
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(r, port, results)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    while results.empty():
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
            sys.exit("a rank failed; its traceback is above")
        time.sleep(0.1)
    found = results.get()
    for rank in ranks:
        rank.join()
    text = table(found)
    print(text)
    output = next((word.split("=", 1)[1] for word in sys.argv[1:] if word.startswith("output=")), None)
    if output:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        about = {"machine": machine, "command": "python -m benchmarks.schedule_fidelity"}
        Path(output).write_text(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    main()
