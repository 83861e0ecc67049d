"""FP8 and BF16 on one GPU: true-size DeepSeek-V3 layers on the te and the torch backend, side by side.

    python benchmarks/fp8_gpu_step.py [steps=12] [rounds=3] [recipe=dsv3_h200]

Each combination trains in a process of its own, the order of combinations turned around every round; steps of the first
third are thrown away; medians. MFU counts against the BF16 peak for both formats, as DeepSeek does (arXiv 2505.09343
table 4). Ends with the kernels that took longest, from torch's profiler. Without a GPU it says so and leaves.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydantic import BaseModel, Field

from launcher.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fp8_gpu_step.json"
COMBINATIONS = [(backend, precision) for backend in ("te", "torch") for precision in ("bf16", "fp8")]
_PROFILED = """
import sys; sys.argv = ["pretrain.py", *sys.argv[1:]]
from torch.profiler import ProfilerActivity, profile
import dsv3_megatron.trainer as trainer
real = trainer.train_step
calls = []
def train_step(*arguments):
    calls.append(0)
    if len(calls) != 4:
        return real(*arguments)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        result = real(*arguments)
    for row in sorted(found.key_averages(), key=lambda r: -r.self_device_time_total)[:15]:
        print(f"KERNEL\\t{row.self_device_time_total / 1e3:.2f}\\t{row.count}\\t{row.key[:110]}")
    return result
trainer.train_step = train_step
from launcher.pretrain import main
sys.exit(main(sys.argv[1:]))
"""


class Arguments(BaseModel):
    """What can be said on the command line."""

    steps: int = Field(12, ge=6, description="steps of each training")
    rounds: int = Field(3, description="how often each combination trains")
    recipe: str = Field("dsv3_h200", description="what to train")


def overrides(recipe: str, backend: str, precision: str, steps: int, directory: str) -> list[str]:
    """Return the command line of one training."""
    words = [f"recipe={recipe}", f"backend={backend}", f"precision={precision}", f"run.steps={steps}"]
    return [*words, f"run.directory={directory}", "logging.wandb=disabled", "run.resume=never"]


def train(arguments: Arguments, backend: str, precision: str) -> dict[str, float]:
    """Return the medians of one training."""
    with tempfile.TemporaryDirectory() as place:
        words = overrides(arguments.recipe, backend, precision, arguments.steps, f"{place}/run")
        subprocess.run(
            [sys.executable, "launcher/pretrain.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        lines = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = lines[arguments.steps // 3 :]
    fields = ("tokens_per_second", "tflops_per_device", "mfu", "memory_peak_bytes")
    return {field: statistics.median(line[field] or 0.0 for line in kept) for field in fields}


def top_kernels(arguments: Arguments, backend: str, precision: str) -> list[list[str]]:
    """Return [milliseconds, calls, name] of the kernels that took longest in one step."""
    with tempfile.TemporaryDirectory() as place:
        words = overrides(arguments.recipe, backend, precision, 5, f"{place}/run")
        command = [sys.executable, "-c", _PROFILED, *words]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("KERNEL\t")]


def main() -> int:
    """Measure, print and write."""
    import torch

    arguments = parse_arguments(Arguments, sys.argv[1:])
    if not torch.cuda.is_available():
        print("fp8_gpu_step: there is no GPU here; run this on one with Transformer Engine installed", file=sys.stderr)
        return 2
    found: dict[str, list[dict[str, float]]] = {f"{b} {p}": [] for b, p in COMBINATIONS}
    for number in range(arguments.rounds):
        for backend, precision in COMBINATIONS if number % 2 == 0 else reversed(COMBINATIONS):
            found[f"{backend} {precision}"].append(train(arguments, backend, precision))
    rows = {
        name: {field: statistics.median(run[field] for run in runs) for field in runs[0]}
        for name, runs in found.items()
    }
    for name, row in rows.items():
        ratio = row["tokens_per_second"] / rows["te bf16"]["tokens_per_second"]
        print(
            f"{name:<12}{row['tokens_per_second']:>10.0f} tokens/s{row['tflops_per_device']:>8.0f} TFLOP/s"
            f"{100 * row['mfu']:>6.1f}% MFU{row['memory_peak_bytes'] / 2**30:>7.1f} GiB{ratio:>6.2f} x te bf16"
        )
    kernels = {f"{b} {p}": top_kernels(arguments, b, p) for b, p in COMBINATIONS}
    from dsv3_megatron.run_directory import environment

    made = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "environment": environment({})}
    RESULTS.write_text(json.dumps({**made, "rows": rows, "kernels": kernels, "command": sys.argv}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
