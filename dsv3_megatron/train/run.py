"""A run, from a recipe and a world to its end: what must be there, in the order in which it can be refused cheapest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.memory.lives import leave_behind
from dsv3_megatron.checkpoint.memory.open import open_memory
from dsv3_megatron.checkpoint.memory.saver import MemorySaver, describe_memory_save
from dsv3_megatron.checkpoint.save import Saver, describe_save
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.build import build as build_data
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.tasks.requests import EncodedTask, read_tasks
from dsv3_megatron.data.tokenizer_identity import described
from dsv3_megatron.health.step_guard import stop_agreed
from dsv3_megatron.health.stop_signals import StopSignals
from dsv3_megatron.megatron.host import choose_device
from dsv3_megatron.model.backend import backend_name
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.preflight.precision import check_precision
from dsv3_megatron.preflight.world import check_world
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.failures.blame import EVENT
from dsv3_megatron.settings import RunSettings
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.callbacks.average import Averaging
from dsv3_megatron.train.callbacks.bad_steps import BadSteps
from dsv3_megatron.train.callbacks.evaluation import Evaluation
from dsv3_megatron.train.callbacks.garbage import GarbageCollection
from dsv3_megatron.train.callbacks.metrics import Metrics
from dsv3_megatron.train.callbacks.saving import EARLY_STOP, Saving
from dsv3_megatron.train.callbacks.saving_in_memory import SavingInMemory
from dsv3_megatron.train.callbacks.sources import Sources
from dsv3_megatron.train.callbacks.stragglers import Stragglers
from dsv3_megatron.train.callbacks.tasks import Tasks
from dsv3_megatron.train.data.ready import ready_together
from dsv3_megatron.train.journal import Journal, Reporter
from dsv3_megatron.train.run_directory import create_for_all_hosts, held_by_rank_0, noted_start, tell_failed_starts
from dsv3_megatron.train.start import check_start, load_start
from dsv3_megatron.train.trainer import Callback, Trainer
from parallel.agree import agreed
from parallel.groups import set_timeouts, start_processes, stop_processes
from parallel.pipeline.watchdog import Watchdog, process_group_store
from parallel.world import World

WATCHDOG_SECONDS = 60.0  # in which every rank's watchdog has looked, told and ended
NEVER_SECONDS = 30 * 24 * 3600.0


def run(
    recipe: Recipe, world: World, reporter: Reporter, resolved_recipe: str, signals: StopSignals | None = None
) -> dict[str, Any]:
    """Train a recipe on this rank of a world; return the summary.

    ``signals`` may have listened since the process began: a warning that came meanwhile ends the run at the next place
    where ranks can agree on it, with nothing but ``stopped_by_signal`` in the summary if no model was built yet.
    Raises: UserError: what a user can fix, before any process group or data exists where that is possible.
    """
    signals = signals or StopSignals()
    layout = check_world(recipe, world)
    check_start(recipe)
    device = choose_device(recipe.run.device, world)
    remarks = check_precision(recipe, backend_name(recipe.backend, device), device)
    recipe.data.check_source()
    folder = ShardFolder.of(recipe.data) if recipe.data.source == "indexed" else None
    with (
        processes(world, device, recipe.run.start_seconds),
        held_by_rank_0(recipe.run.directory, reporter.note),
        noted_start(recipe.run.directory),
    ):
        if _warned(signals, world, device):  # before the minutes that a large model takes to build and to load
            if world.rank == 0:
                reporter.note(EARLY_STOP)
            return {"stopped_by_signal": True}
        watchdog = watchdog_of(recipe, world, device)
        try:
            with watchdog.phase("making the data ready", recipe.run.start_seconds):
                place = ready_together(folder, reporter.note) if folder else None
                with agreed():
                    data = build_data(
                        recipe.data,
                        vocab_size=recipe.model.vocab_size,
                        seed=recipe.run.seed,
                        folder=folder,
                        place=place,
                    )
                    tasks = read_tasks(recipe.evaluate, data.tokenizer, recipe.data.sequence_length)
            with watchdog.phase("building the model", recipe.run.start_seconds):
                parts = build_parts(recipe, layout, device)
            set_timeouts(longest_wait_seconds(recipe.run))
            parts.watchdog = watchdog
            trainer = prepare_trainer(parts, data, reporter, resolved_recipe, tasks)
            for line in (*remarks, *(data.tokenizer.notes if data.tokenizer else ()), *data.notes):
                trainer.journal.note(line)
            return trainer.train(signals)
        finally:
            watchdog.close()


def prepare_trainer(
    parts: Parts, data: Data, reporter: Reporter, resolved_recipe: str, tasks: Sequence[EncodedTask] = ()
) -> Trainer:
    """Make the run directory, load the newest valid checkpoint if there is one, open the metrics."""
    recipe, directory = parts.recipe, RunDirectory(parts.recipe.run.directory)
    journal = Journal(directory, reporter, speaks=dist.get_rank() == 0)
    watchdog, start_seconds = parts.watchdog, recipe.run.start_seconds
    with watchdog.phase("making the run directory", start_seconds):
        create_for_all_hosts(directory)
        tell_failed_starts(
            directory, lambda blame: journal.event(EVENT, asdict(blame), f"a start before failed: {blame}")
        )
    text = {
        "tokenizer": described(data.tokenizer),
        "data": data.identity.described() if data.identity else None,
    }
    saver = Saver(
        directory.checkpoints,
        recipe.checkpoint,
        parts,
        resolved_recipe,
        lambda name, values: journal.event(name, values, describe_save(name, values)),
        **text,
    )
    with watchdog.phase("finding states in memory", start_seconds):
        memory = open_memory(
            parts,
            directory,
            resolved_recipe,
            lambda name, values: journal.event(name, values, describe_memory_save(name, values)),
            journal.note,
            text,
        )
    with watchdog.phase("loading a checkpoint", recipe.run.checkpoint_seconds):
        start = load_start(parts, directory, journal, data, memory)
        if memory is not None:
            memory.begin(start.in_memory)
    saver.saved_step = start.saved_step
    trainer = Trainer(parts, data, callbacks_of(parts, data, saver, tasks, memory), journal, start.progress)
    with watchdog.phase("opening the metrics", start_seconds), agreed(looked=journal.speaks):
        if journal.speaks and memory is None:
            leave_behind(directory.memory, journal.note)
        journal.open(parts, start.progress, resolved_recipe, finished=trainer.finished, text=data.identity)
        journal.keep_tokenizer(data.tokenizer)
    return trainer


def callbacks_of(
    parts: Parts,
    data: Data,
    saver: Saver,
    tasks: Sequence[EncodedTask] = (),
    memory: MemorySaver | None = None,
) -> list[Callback]:
    """Return what happens beside the steps: after a step in this order, at the end in reverse.

    What a step's line of metrics needs comes before it is written; a roll-back comes after that, and before an
    evaluation or a save of what would be rolled back.
    """
    recipe, health = parts.recipe, parts.recipe.health
    callbacks: list[Callback] = []
    if parts.ema is not None:
        callbacks.append(Averaging(parts.ema))
    if health.straggler_every_steps and parts.layout.world_size > 1:
        callbacks.append(Stragglers(health, parts))
    callbacks += [
        Sources(data),
        Metrics(recipe),
        BadSteps(health, saver),
        Evaluation(data, recipe.run.evaluate_every_steps, is_first=dist.get_rank() == 0),
    ]
    if tasks:
        callbacks.append(Tasks(tasks, recipe.evaluate.every_steps))
    if memory is not None:
        callbacks.append(SavingInMemory(memory, saver))
    callbacks.append(Saving(saver))
    if recipe.run.collect_garbage_every_steps:
        callbacks.append(GarbageCollection(recipe.run.collect_garbage_every_steps))
    return callbacks


def watchdog_of(recipe: Recipe, world: World, device: torch.device) -> Watchdog:
    """Return the watchdog of this rank, which reports and ends what hangs."""
    return Watchdog(
        recipe.run.hang_seconds,
        rank=world.rank,
        world_size=world.size,
        store=process_group_store(),
        abort_seconds=recipe.run.abort_seconds,
        device=device,
    )


def longest_wait_seconds(run: RunSettings) -> float:
    """Return how long a rank may wait in a collective before torch ends it: the watchdog has ended all by then, and
    torch ends what nobody watches."""
    if run.abort_seconds is None:
        return NEVER_SECONDS
    return max(run.start_seconds, run.checkpoint_seconds, run.abort_seconds) + WATCHDOG_SECONDS


@contextmanager
def processes(world: World, device: torch.device, start_seconds: float = 600) -> Iterator[None]:
    """The default process group, for as long as the block lasts.

    After an error the group of several ranks is left as it is: taking it down waits for messages of ranks that wait for
    this one, or closes their connections, so that they fail before this one has said why. The process must then end
    without ceremony (launcher.pretrain), which ends the others.
    """
    start_processes(world, device, start_seconds)
    try:
        yield
    except BaseException:
        if world.size == 1:
            stop_processes()
        raise
    else:
        stop_processes()


def _warned(signals: StopSignals, world: World, device: torch.device) -> bool:
    if world.rank == 0:  # one rank asks the file system for all
        signals.look_back()
    return bool(stop_agreed(signals.wanted, device)[0])
