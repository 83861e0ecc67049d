"""Is this GPU machine right? Seven minutes at most, one table: PASS, FAIL or SKIPPED with the reason, and a JSON file.

    make gpu-check
    python3 -m benchmarks.gpu_check [seconds=420] [only=NAME,...] [output=FILE] [device=cpu]

Every check runs in a process of its own, what is worth most first, and each result is written as soon as it is known.
``device=cpu`` rehearses all that a CPU can on stand-ins. Exit code 0: nothing failed; 1: something did, or nothing
passed; 2: there is no GPU. docs/gpu_check.md says what each check means.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]


if lacking := [n for n in ("torch", "megatron", "hydra", "omegaconf", "pydantic") if find_spec(n) is None]:
    sys.exit(
        f"package: this python ({sys.executable}) has no {', '.join(lacking)}; run make env, or name another PYTHON="
    )

from pydantic import BaseModel, Field

from benchmarks.gpu_check.outcome import Visit
from benchmarks.gpu_check.record import Record, table
from benchmarks.gpu_check.registry import CHECKS, Check
from benchmarks.gpu_check.runner import Runner
from launcher.command_line.arguments import parse_arguments
from launcher.command_line.console import guarded
from launcher.command_line.help import command_help
from parallel.errors import RecipeError

MOST_AT_ONCE = 8  # checks that share a GPU: each has a context of half a GiB and the kernels of a small model
PATIENCE = 5.0  # of a rehearsal, whose machine does other work too: limits are a GPU's


class Arguments(BaseModel):
    """What can be said on the command line."""

    seconds: float = Field(420.0, gt=0, description="time of all checks together")
    only: str = Field("", description="names of checks, or how they begin, separated by commas; what they need is run")
    output: Path = Field(Path("runs/gpu_check/found.json"), description="JSON file to write; logs go beside it")
    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu: rehearse on stand-ins")
    gpus: int = Field(0, ge=0, description="GPUs to use; 0 = all. With device=cpu: processes that stand for them")


def chosen(only: str, checks: Sequence[Check] = CHECKS) -> list[Check]:
    """Return the checks that are asked for, and those whose findings they need. Raises RecipeError: there is none."""
    if not only:
        return list(checks)
    wanted: set[str] = set()
    for start in (word.strip() for word in only.split(",")):
        found = [c.name for c in checks if any(name.startswith(start) for name in (c.name, *c.fills))]
        if not found:
            raise RecipeError(f"only = {start} is no check; checks are: {', '.join(c.name for c in checks)}")
        wanted.update(found)
    needed = {name for check in checks if check.name in wanted for name in check.after}
    return [check for check in checks if check.name in wanted or needed & set(check.fills)]


def visit_of(arguments: Arguments, scratch: Path) -> Visit | None:
    """Return what the checks are told of this machine; None where there is no GPU."""
    logs = arguments.output.with_name(f"{arguments.output.stem}_logs").absolute()
    if arguments.device == "cpu":
        return Visit("cpu", arguments.gpus or 1, logs, scratch, te=_te_stands_in())
    import torch

    if not (torch.version.cuda and torch.cuda.is_available()):
        return None
    here = torch.cuda.device_count()  # asks the driver, makes no context: memory is the checks' alone
    te = find_spec("transformer_engine") is not None
    return Visit("cuda", min(arguments.gpus or here, here), logs, scratch, te=te)


def main(words: Sequence[str]) -> int:
    """Check, print, write; return the exit code."""
    if {"--help", "-h"} & set(words):
        print(command_help(__doc__, Arguments))
        return 0
    arguments = parse_arguments(Arguments, words)
    checks = chosen(arguments.only)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        visit = visit_of(arguments, Path(scratch))
        if visit is None:
            print("gpu_check: there is no GPU here; device=cpu rehearses it on stand-ins", file=sys.stderr)
            return 2
        return carry_out(checks, visit, arguments, words)


def carry_out(checks: Sequence[Check], visit: Visit, arguments: Arguments, words: Sequence[str]) -> int:
    """Run the checks and keep what they find; return the exit code."""
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = Record(arguments.output, words, arguments.seconds)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    runner = Runner(
        visit,
        arguments.seconds,
        **_started(visit),
        told=lambda row: record.add(row, runner.visit),
    )
    runner.run(checks)
    record.write(runner.visit)
    print("\n".join(["", *table(record.rows, runner.visit), f"written: {arguments.output}"]))
    return record.exit_code


def _started(visit: Visit) -> dict[str, Any]:
    """Return how processes start. In a rehearsal they are forked from one that has imported everything: nothing there
    is spoiled by a fork, and it takes a third of the time."""
    if not visit.stands_in:
        cores = os.cpu_count() or 1
        workers = max(1, min(MOST_AT_ONCE, cores // 2))
        # Each check has its share of the cores: torch takes all of them for every process, and sixteen threads of each
        # made the CPU's three steps last a minute instead of seconds (measured beside an H200).
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
        return {"workers": workers}
    from testing.fork_servers import forked_from

    return {
        "context": multiprocessing.get_context("forkserver"),
        "patience": PATIENCE,
        "forked": lambda check: forked_from(check.stand_ins),
    }


def _te_stands_in() -> bool:
    """Return whether Transformer Engine's Python was fetched with the environment."""
    from testing.te.tree import tree

    try:
        return tree().is_dir()
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(guarded(main))
