"""How long from the command to the end of the first step, and where do the seconds go?

Starts launcher/pretrain.py recipe=dsv3_tiny run.steps=1 as a user does (tokens cached, as from the second run on), and
reads the clock when the first line of metrics is there. Beside it: python importing torch, and torch with
transformers' model class - what any training script on this machine pays before its first line. In turns, medians.

    python -m benchmarks.startup [repeats=5] [output=FILE.json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
from pydantic import BaseModel, PositiveInt

from benchmarks.work import machine
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

IMPORTS = {
    "python -c 'import torch'": "import torch",
    "torch and transformers' DeepSeek-V3": "import torch; from transformers import DeepseekV3ForCausalLM",
}


class Arguments(BaseModel):
    """What the benchmark takes."""

    repeats: PositiveInt = 5
    output: str = "benchmarks/results/startup.json"


def first_step_seconds() -> float:
    """Return seconds from the start of the command to the first line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["recipe=dsv3_tiny", "run.steps=1", f"run.directory={folder}/run", "logging.wandb=disabled"]
        start = time.perf_counter()
        running = subprocess.Popen(
            [sys.executable, "launcher/pretrain.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        metrics = Path(folder, "run", "metrics.jsonl")
        while not (metrics.exists() and metrics.stat().st_size):
            if running.poll() is not None:
                raise RuntimeError("the run ended before its first step")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        running.wait()
    return seconds


def import_seconds(code: str) -> float:
    """Return seconds of a python that only imports."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    return time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Measure, print a table, write the figures."""
    given = parse_arguments(Arguments, arguments)
    before, seconds = machine(), {"pretrain.py to the first step": [], **{name: [] for name in IMPORTS}}
    first_step_seconds()  # fills the cache of tokens and of files
    for _ in range(given.repeats):
        seconds["pretrain.py to the first step"].append(first_step_seconds())
        for name, code in IMPORTS.items():
            seconds[name].append(import_seconds(code))
    print("| from nothing to | seconds |\n|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {median(found):.1f} |")
    summary = {
        "machine": before,
        "command": f"python -m benchmarks.startup repeats={given.repeats}",
        "seconds": seconds,
    }
    Path(given.output).write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
