"""The CPU benchmarks that take minutes, one after the other, and one table of what they found: make bench.

Each is also a program of its own, with a docstring that says what is compared and why that is fair; this runs them with
few repetitions. What takes longer, or needs a GPU, is listed in docs/performance.md with its command.

    python -m benchmarks.run_all [only=cpu_step,startup] [keep=true]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
from pydantic import BaseModel, Field

from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded

Row = tuple[str, str, str]  # what, figure, goal
WORDS = {
    "cpu_step": ["repeats=3"],
    "scaling": ["repeats=3"],
    "startup": ["repeats=3"],
    "data_rates": [],
    "checkpoints": ["repeats=3"],
}


class Arguments(BaseModel):
    """What the command takes."""

    only: str | None = Field(None, description="names of benchmarks, separated by commas; null = all")
    keep: bool = Field(False, description="write figures to benchmarks/results and docs/img, as one does for a release")


def cpu_step(found: dict[str, Any]) -> Iterator[Row]:
    """Rows of benchmarks/cpu_step.py."""
    for name in ("tiny", "100M"):
        one, two = found[name], found[f"{name}, two processes"]
        yield f"{name}: a step beside transformers + AdamW(fused)", f"{one['ratio']:.2f} x", "1.3 x"
        goal = "60%" if name == "100M" else "-"
        yield f"{name}: of the machine's float32 matrix product", f"{one['share_of_matrix_product']:.0%}", goal
        for layout in ("DP 2", "EP 2"):
            yield f"{name}: {layout} beside one process, a thread each", f"{two[layout]:.2f} x", "1.7 x"


def scaling(found: dict[str, Any]) -> Iterator[Row]:
    """Rows of benchmarks/scaling.py."""
    for name, one in found.items():
        if isinstance(one, dict) and "exponent" in one:
            yield f"a step's time over {name}, exponent", f"{one['exponent']:.2f}", f"{one['at_most']}"


def startup(found: dict[str, Any]) -> Iterator[Row]:
    """Rows of benchmarks/startup.py."""
    for name, seconds in found["seconds"].items():
        goal = "6 s" if name.startswith("pretrain") else "-"
        yield name, f"{sorted(seconds)[len(seconds) // 2]:.1f} s", goal


def data_rates(found: dict[str, Any]) -> Iterator[Row]:
    """Rows of benchmarks/data_rates.py."""
    ratio = found["prepare_over_encode_batch, all cores"]
    yield "prepare_data beside the tokenizer's encode_batch", f"{ratio:.2f} x", "0.8 x"


def checkpoints(found: dict[str, Any]) -> Iterator[Row]:
    """Rows of benchmarks/checkpoints.py."""
    save = found["save"]
    for kind in ("synchronous", "asynchronous"):
        yield f"training stands still for a save, {kind}", f"{save[f'stall_seconds_{kind}']:.2f} s", "-"
    yield "export beside safetensors' save_file of the same tensors", f"{found['export']['ratio']:.2f} x", "-"
    yield "kill -9 of a rank to the next step", f"{found['restart']['kill_to_next_step_seconds']:.1f} s", "-"


ROWS = {f.__name__: f for f in (cpu_step, scaling, startup, data_rates, checkpoints)}


def main(arguments: list[str]) -> int:
    """Run them and print the table."""
    given, begin, rows = parse_arguments(Arguments, arguments), time.monotonic(), []
    names = given.only.split(",") if given.only else list(WORDS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            output = Path(ROOT / "benchmarks" / "results" if given.keep else folder, f"{name}.json")
            command = [sys.executable, "-m", f"benchmarks.{name}", *WORDS[name], f"output={output}"]
            if name == "scaling":
                command.append(f"plot={ROOT}/docs/img/scaling.svg" if given.keep else f"plot={folder}/scaling.svg")
            print(f"{name} ...", flush=True)
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            rows += ROWS[name](json.loads(output.read_text()))
    print("\n| what | here | goal |\n|---|---|---|")
    print("\n".join(f"| {what} | {figure} | {goal} |" for what, figure, goal in rows))
    print(f"\n{(time.monotonic() - begin) / 60:.0f} minutes; commands and conditions: docs/performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
