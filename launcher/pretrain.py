"""Train a recipe: torchrun --nproc-per-node N launcher/pretrain.py recipe=NAME key=value ...

Goes on by itself from the newest valid checkpoint of the run directory. One process needs no torchrun:
python launcher/pretrain.py recipe=dsv3_tiny
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_megatron.health.stop_signals import StopSignals

# A warning that comes during the imports below, which take seconds, is kept too.
SIGNALS = StopSignals().listen_early() if __name__ == "__main__" else None

from dsv3_megatron.planning.goodput.expected import with_planned_interval
from dsv3_megatron.preflight.world import check_queues, check_world
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.failures.records import start_folder
from dsv3_megatron.run.made import for_owner
from launcher.command_line import typed
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import ConsoleReporter, SilentReporter, guarded
from launcher.command_line.hydra_flags import run_command
from launcher.command_line.last_words import Failure, arrived, last_words, note_alone
from launcher.command_line.refusal import Vote, refusal_file, write_refusal
from parallel.errors import UserError
from parallel.world import World

if TYPE_CHECKING:
    import torch

_noting: dict[str, Path | None] = {"in": None}  # where this start notes who failed, once a recipe says where it runs


def train(recipe: Recipe, signals: StopSignals | None = None) -> int:
    """Train on this rank of the world that torchrun started; return the exit code.

    ``signals``: listens already, since the process began.
    """
    for_owner(recipe.run.readable_by)
    _noting["in"] = start_folder(recipe.run.directory)
    world = World.from_environment()
    layout = check_world(recipe, world)  # before torch is imported: a wrong world is reported in a second
    recipe.data.check_source()
    prepare_process(recipe, world)
    from dsv3_megatron.train.run import run  # megatron-core, which reads what was prepared

    first = world.rank == 0
    remarks = [_of_open_ports(world)] if world.is_open else []
    if recipe.checkpoint.every_minutes == "auto":
        recipe = with_planned_interval(recipe, layout)
        remarks.append(_of_interval(recipe, world))
    reporter = ConsoleReporter(recipe.logging.console_every_steps, remarks) if first else SilentReporter()
    summary = run(recipe, world, reporter, resolved_yaml(recipe), signals)
    if first and not summary["stopped_by_signal"]:
        reporter.note(f"finished: {summary['step']} steps, {summary['tokens']:,} tokens in {recipe.run.directory}")
    return 0


def _of_open_ports(world: World) -> str:
    return (
        "note: torchrun listens on all addresses of this host, and whoever reaches its port can run programs as "
        f"you; `{typed.command('train', ranks=world.size)}` listens on none (docs/security.md)"
    )


def _of_interval(recipe: Recipe, world: World) -> str:
    minutes, gpus = recipe.checkpoint.every_minutes, f"{world.size:,} GPU{'s' if world.size > 1 else ''}"
    return f"checkpoint.every_minutes = auto: {minutes:g} minutes between saves, planned for {gpus}"


def prepare_process(recipe: Recipe, world: World) -> torch.device:
    """Do what must be done before anything imports megatron-core: threads, what TE reads at import, the device, which
    is returned."""
    prepare_threads(world.size)
    # torch, once threads are set
    from dsv3_megatron.megatron.host import choose_device
    from dsv3_megatron.precision.transformer_engine import prepare_environment

    prepare_environment(recipe.precision)
    device = choose_device(recipe.run.device, world)
    if device.type == "cuda":
        check_queues(recipe, os.environ)
    return device


def prepare_threads(world_size: int) -> None:
    """Share the cores among this machine's ranks, unless the user decided (torchrun sets OMP_NUM_THREADS=1)."""
    import torch  # a second, which a refused recipe need not wait for

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ or ranks > 1:
        torch.set_num_threads(max(1, cores // ranks))


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 0 trained, 2 bad input, 3 does not fit."""
    return run_command(partial(train, signals=SIGNALS), arguments, __doc__)


def attempt(arguments: Sequence[str], command: Callable[[Sequence[str]], int] = main) -> int:
    """Run a command as one of several ranks: after an error report it and end without ceremony, so that no rank waits
    for it.

    A batch job is told of what starting again cannot fix: torchrun would turn the exit code into 1.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    left = arrived()
    try:
        code = command(arguments)
        left()
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        refused = refusal_file(error)
        if alone and refused:
            write_refusal(refused, error)
        if alone and isinstance(error, UserError):
            raise
        if alone:
            traceback.print_exc()
            note_alone(Failure.of(error), _noting["in"])
        code = 1 if alone else last_words(Failure.of(error), Vote(refused, error) if refused else None, _noting["in"])
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # interpreter shutdown would join the threads of connections that wait for other ranks


def main_of_rank() -> None:
    """Run as a process of its own; what ends it early is told by the first rank alone."""
    sys.exit(guarded(attempt, speaks=os.environ.get("RANK", "0") == "0"))


if __name__ == "__main__":
    main_of_rank()
