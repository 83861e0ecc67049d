"""Training true-size DeepSeek-V3 layers on one GPU: ours, plain megatron-core and transformers, in BF16 and FP8.

    python -m benchmarks.fp8_gpu_step [steps=12] [rounds=3] [recipe=NAME] [only=ROWS] [output=FILE]

Rows *te* and *torch* are our trainer's whole step on either backend, its metrics included; *megatron* and
*transformers* are in benchmarks/gpu_sides.py, with what they leave out. Same shape, batch, sequence and GPU. Every row
trains in a process of its own, the order of rows turned around every round; steps of the first third are thrown away;
medians of steps, then of rounds. FLOPs are the paper's for all (causal pairs counted, nothing recomputed), and MFU is
against the BF16 peak in both formats, as DeepSeek counts (arXiv 2505.09343 table 4). *te bf16 dense* has no MoE layer.

Ends with the kernels that took longest, and writes the stage times of each of our rows to
benchmarks/results/gpu_stage_times_*.json, for ``calibrate`` of launcher/plan.py. A row that fails is said so, and the
others go on; what is known is written after every training. Without a GPU it says so and leaves.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from benchmarks.gpu_check.sizing import sized_here
from benchmarks.gpu_table import in_paper_terms, reason, table
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded
from parallel.errors import RecipeError

ROOT = Path(__file__).resolve().parent.parent
OURS = ("te bf16", "te fp8", "torch bf16", "torch fp8")
ROWS = (*OURS, "megatron bf16", "megatron fp8", "transformers bf16", "te bf16 dense")


class Arguments(BaseModel):
    """What can be said on the command line."""

    steps: int = Field(12, ge=6, description="steps of each training")
    rounds: int = Field(3, ge=1, description="how often each row trains")
    recipe: str = Field("", description="what to train; empty = dsv3_one_gpu, as much of it as this GPU holds")
    only: str = Field(",".join(ROWS), description=f"rows, of: {', '.join(ROWS)}")
    kernels: bool = Field(True, description="list the longest kernels of our rows")
    stages: bool = Field(True, description="measure the stage times of our rows")
    megatron: str = Field("", description="more of megatron-core's configuration: KEY=VALUE,KEY=VALUE")
    transformers: str = Field("", description="attention=flash_attention_2, compiled=true, or both")
    output: Path = Field(ROOT / "benchmarks/results/fp8_gpu_step.json", description="JSON file to write")


def words_of(arguments: Arguments, row: str) -> list[str]:
    """Return the recipe of a row."""
    backend, precision, *dense = row.split()
    words = [*sized_here(arguments.recipe), f"backend={backend}", f"precision={precision}"]
    return [*words, "model.first_k_dense_replace=${model.num_hidden_layers}"] if dense else words


def run_ours(arguments: Arguments, row: str, place: str) -> None:
    """Train one of our rows into ``place``/run."""
    words = [*words_of(arguments, row), f"run.steps={arguments.steps}", f"run.directory={place}/run"]
    command = [sys.executable, "-m", "benchmarks.gpu_training", *words, "logging.wandb=disabled"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def run_side(arguments: Arguments, row: str, side: str, output: Path) -> Any:
    """Return what benchmarks/gpu_sides.py finds."""
    name, precision = row.split()
    given = [f"side={side}", f"precision={precision}", f"recipe={arguments.recipe}", f"steps={arguments.steps}"]
    given.append(f"backend={name}" if side in ("stages", "kernels") else f"settings={getattr(arguments, side)}")
    command = [sys.executable, "-m", "benchmarks.gpu_sides", *given, f"output={output.resolve()}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(output.read_text())


def train(arguments: Arguments, row: str) -> dict[str, float]:
    """Return the medians of one training."""
    with tempfile.TemporaryDirectory() as place:
        if not row.startswith(OURS):
            found = run_side(arguments, row, row.split()[0], Path(place) / "side.json")
            return in_paper_terms(sized_here(arguments.recipe), found["step_seconds"], found["memory_peak_bytes"])
        run_ours(arguments, row, place)
        text = (Path(place) / "run" / "metrics.jsonl").read_text()
    kept = [json.loads(line) for line in text.splitlines()][arguments.steps // 3 :]
    fields = ("tokens_per_second", "tflops_per_device", "mfu", "memory_peak_bytes")
    return medians([{field: line[field] for field in fields} for line in kept])


def top_kernels(arguments: Arguments, row: str) -> list[list[Any]]:
    """Return [milliseconds, calls, name] of the kernels that took longest in one step."""
    with tempfile.TemporaryDirectory() as place:
        return run_side(arguments, row, "kernels", Path(place) / "kernels.json")


def medians(runs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the median of every quantity; None where it is not known."""
    known = {field: [run[field] for run in runs if run[field] is not None] for field in runs[0]}
    return {field: statistics.median(values) if values else None for field, values in known.items()}


def main(words: list[str]) -> int:
    """Measure, print and write."""
    import torch

    arguments = parse_arguments(Arguments, words)
    if not torch.cuda.is_available():
        print("fp8_gpu_step: there is no GPU here; run this on one with Transformer Engine installed", file=sys.stderr)
        return 2
    from dsv3_megatron.run.directory import environment

    made: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "command": words}
    made |= {"environment": environment({}), "rows": {}, "rounds": {}, "kernels": {}, "stage_seconds": {}, "failed": {}}
    rows = [row.strip() for row in arguments.only.split(",")]
    if unknown := set(rows) - set(ROWS):
        raise RecipeError(f"only = {', '.join(sorted(unknown))} is no row; rows are {', '.join(ROWS)}")

    def attempt(row: str, what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except subprocess.CalledProcessError as error:
            made["failed"][f"{row}, {what}"] = reason(error.stderr) or str(error)
        return None

    def keep() -> None:
        made["rows"] = {name: medians(runs) for name, runs in made["rounds"].items()}
        arguments.output.write_text(json.dumps(made, indent=1) + "\n")

    for number in range(arguments.rounds):
        for row in rows if number % 2 == 0 else reversed(rows):
            if (found := attempt(row, "training", partial(train, arguments, row))) is not None:
                made["rounds"].setdefault(row, []).append(found)
            keep()
    for row in [row for row in rows if row in OURS]:
        if arguments.stages:
            path = arguments.output.with_name(f"gpu_stage_times_{row.replace(' ', '_')}.json")
            made["stage_seconds"][row] = attempt(row, "stages", partial(run_side, arguments, row, "stages", path))
        if arguments.kernels:
            made["kernels"][row] = attempt(row, "kernels", partial(top_kernels, arguments, row))
        keep()
    print("\n".join(table(made["rows"], made["failed"])))
    return 1 if made["failed"] else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
