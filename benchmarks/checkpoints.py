"""What does a save cost a run, how fast is an export, how soon does a killed run go on?

Save: wall time of a few steps with a synchronous save, an asynchronous one, and none, interleaved in one process on the
same model; what a save costs is the difference to none, of medians. Export: MB/s of export_hf's path (read, convert,
write, read back, compare, checksum) in BF16 with one process, beside safetensors' plain save_file of the same tensors,
interleaved. Restart: seconds from kill -9 of a rank under torchrun --max-restarts to the first step done again.

python benchmarks/checkpoints.py [repeats=5] [steps=4] [hidden=256] [output=FILE.json]
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BASE = [
    "data=synthetic",
    "logging.wandb=disabled",
    "data.sequence_length=64",
    "optim.micro_batch=2",
    "optim.global_batch=2",
]


def saves(place: Path, repeats: int, steps: int, hidden: int) -> dict[str, float]:
    """Return median seconds of a few steps with each kind of save, the stall that the run measures, and bytes."""
    import torch

    from dsv3_megatron.build import build_parts
    from dsv3_megatron.checkpoint.save import Flags, Saver
    from dsv3_megatron.data.samples import Synthetic, step_batches
    from dsv3_megatron.step import StepValues, train_step
    from launcher.compose import compose
    from parallel.groups import start_processes, stop_processes
    from parallel.world import World

    shape = [f"model.hidden_size={hidden}", "model.vocab_size=8192", f"model.moe_intermediate_size={hidden}"]
    recipe = compose([*BASE, *shape])
    values = StepValues(learning_rate=1e-4, mtp_weight=0.3, bias_speed=0.001, balance_weight=1e-4)
    seconds: dict[str, list[float]] = {"none": [], "synchronous": [], "asynchronous": []}
    told: dict[str, list[dict]] = {"synchronous": [], "asynchronous": []}
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        source, number = Synthetic(recipe.model.vocab_size, 64, seed=1), 0

        def some_steps(saver: Saver | None) -> None:
            nonlocal number
            for _ in range(steps):
                batches = step_batches(source, first=2 * number, global_batch=2, micro_batch=2, dp_rank=0, dp=1)
                train_step(parts, batches, values)
                number += 1
                if saver is not None:
                    saver.advance(Flags(*saver.flags()), number)

        def saver_of(kind: str) -> Saver:
            settings = recipe.checkpoint.model_copy(update={"asynchronous": kind == "asynchronous", "keep": 1})
            return Saver(place / kind, settings, parts, "", lambda name, event: told[kind].append(event))

        savers = {kind: saver_of(kind) for kind in told}
        some_steps(None)
        for repeat in range(repeats + 1):
            for kind in seconds if repeat % 2 else reversed(seconds):
                saver, begin = savers.get(kind), time.perf_counter()
                if saver is not None:
                    saver.save({"step": number, "tokens": 0, "samples": 0, "skipped": 0})
                some_steps(saver)
                if saver is not None:
                    saver.finish(number)
                if repeat:  # the first of each is warm-up
                    seconds[kind].append(time.perf_counter() - begin)
    finally:
        stop_processes()
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    return {
        "checkpoint_bytes": told["synchronous"][-1]["bytes"],
        "steps": steps,
        "seconds_without": medians["none"],
        **{f"lost_seconds_{k}": medians[k] - medians["none"] for k in told},
        **{f"stall_seconds_{k}": statistics.median(e["stall_seconds"] for e in told[k][1:]) for k in told},
        "spread_seconds": {kind: [min(found), max(found)] for kind, found in seconds.items()},
    }


def exports(place: Path, repeats: int) -> dict[str, float]:
    """Return MB/s of the export and of a plain save_file of the same tensors, from a checkpoint of ``saves``."""
    from safetensors.torch import load_file, save_file

    from dsv3_megatron.checkpoint.exporting import export
    from dsv3_megatron.checkpoint.manifest import newest_valid
    from dsv3_megatron.checkpoint.regions import Regions
    from launcher.compose import compose

    checkpoint = newest_valid(place / "synchronous")[0]
    vocabulary, hidden = Regions(checkpoint).shapes["embedding.word_embeddings.weight"]
    widths = [f"model.hidden_size={hidden}", f"model.moe_intermediate_size={hidden}"]
    model = compose([*BASE, *widths, f"model.vocab_size={vocabulary}"]).model
    folder = place / "export"
    folder.mkdir()

    def ours() -> int:
        for old in folder.iterdir():
            old.unlink()
        return export(model, checkpoint, folder, dtype="bf16", shard_bytes=5 * 2**30, processes=1)

    size = ours()
    tensors = load_file(next(folder.glob("*.safetensors")))

    def plain() -> None:
        target = place / "plain.safetensors"
        save_file(tensors, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    rates = interleaved({"export": ours, "plain": plain}, repeats)
    return {
        "bytes": size,
        "export_mb_per_second": size / rates["export"] / 1e6,
        "plain_copy_mb_per_second": size / rates["plain"] / 1e6,
        "ratio": rates["plain"] / rates["export"],
    }


def interleaved(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each work, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name in works if repeat % 2 else reversed(works):
            begin = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def restart(place: Path) -> dict[str, float]:
    """Return seconds from the kill of a rank to the first step that its successors finish."""
    import psutil

    words = [*BASE, "parallel.expert=2", "optim.global_batch=4", "run.steps=100000", "checkpoint.every_steps=5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", "launcher/pretrain.py", *words, f"run.directory={place / 'run'}"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events, metrics = place / "run" / "events.jsonl", place / "run" / "metrics.jsonl"

    def wait_until(happened: Callable[[], bool]) -> float:
        deadline = time.monotonic() + 300
        while not happened():
            if time.monotonic() > deadline or running.poll() is not None:
                raise RuntimeError("the run did not get there")
            time.sleep(0.02)
        return time.monotonic()

    def lines(path: Path) -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    try:
        wait_until(lambda: lines(events) >= 1 and lines(metrics) > 6)
        ranks = psutil.Process(running.pid).children(recursive=True)
        victim = next(p for p in ranks if "pretrain.py" in " ".join(p.cmdline()))
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        resumed = wait_until(lambda: '"resumed"' in events.read_text())
        there = lines(metrics)
        stepped = wait_until(lambda: lines(metrics) > there)
        return {"kill_to_resumed_seconds": resumed - killed, "kill_to_next_step_seconds": stepped - killed}
    finally:
        running.terminate()
        running.wait(timeout=120)


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    given = dict(argument.split("=", 1) for argument in arguments)
    repeats, steps = int(given.get("repeats", 5)), int(given.get("steps", 4))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = {"save": saves(place, repeats, steps, int(given.get("hidden", 256)))}
        print(json.dumps(found["save"], indent=1), flush=True)
        found["export"] = exports(place, repeats)
        print(json.dumps(found["export"], indent=1), flush=True)
        found["restart"] = restart(place)
        print(json.dumps(found["restart"], indent=1), flush=True)
    found["machine"] = {
        "cpus": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "command": f"benchmarks/checkpoints.py repeats={repeats} steps={steps}",
    }
    output = Path(given.get("output", ROOT / "benchmarks" / "results" / "checkpoints.json"))
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
