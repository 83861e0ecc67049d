"""What does emulated FP8 cost on a CPU? The step of ``dsv3_tiny`` in fp32, bf16 and fp8, one process, one thread.

    python -m benchmarks.fp8_cpu_step [rounds=5] [steps=6]

The same steps on the same tokens in processes that take turns; the first two steps of each are thrown away; the ratio
of the medians is the result. Emulation is for studying numbers, not for speed: the aim is at most 2.5 x the fp32 step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel, Field

from launcher.command_line.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fp8_cpu_step.json"
PRECISIONS = ("fp32", "bf16", "fp8")


class Arguments(BaseModel):
    """What can be said on the command line."""

    rounds: int = Field(5, description="how often each precision takes its turn")
    steps: int = Field(6, ge=4, description="steps of a turn")


def step_seconds(precision: str, steps: int) -> float:
    """Return the median step of one training."""
    with tempfile.TemporaryDirectory() as place:
        words = [f"precision={precision}", f"run.steps={steps}", f"run.directory={place}/run", "logging.wandb=disabled"]
        command = [sys.executable, "launcher/pretrain.py", "recipe=dsv3_tiny", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_seconds"] for line in lines[2:])


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments(Arguments, sys.argv[1:])
    found: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for number in range(arguments.rounds):
        for name in PRECISIONS if number % 2 == 0 else reversed(PRECISIONS):
            found[name].append(step_seconds(name, arguments.steps))
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:<6}{medians[name]:>7.2f} s a step ({spread}){medians[name] / medians['fp32']:>7.2f} x fp32")
    import torch

    made = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "seconds": found}
    ratio = {name: round(medians[name] / medians["fp32"], 3) for name in PRECISIONS}
    command = "python -m benchmarks.fp8_cpu_step"
    RESULTS.write_text(json.dumps({"command": command, **made, "ratio_to_fp32": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
