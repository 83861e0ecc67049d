"""A rank's run with watchers between its steps: what tests/end_to_end/test_watching_changes_nothing.py compares."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.data.source.build import build as build_data
from dsv3_megatron.health.stop_signals import StopSignals
from dsv3_megatron.optim.optimizer import parts_of
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.run import prepare_trainer, watchdog_of
from dsv3_megatron.train.step import StepResult
from dsv3_megatron.train.trainer import Trainer
from launcher.command_line.compose import compose, resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.training.tiny import SMALL
from testing.training.watchers import WATCHERS, evaluate, save_beside, saver_of

TINY = (
    *SMALL,
    "model.num_hidden_layers=4",
    "optim.global_batch=4",
    "optim.micro_batch=1",
    "data.sequence_length=16",
    "optim.learning_rate=0.01",
    "run.steps=4",
    "checkpoint.keep=2",
)
# What is on for a whole run, beside training.
ALWAYS = {
    "average": ("optim.ema_decay=0.5",),
    "report": ("logging.report_every_seconds=1", "logging.expert_load_every_steps=1"),
    "stragglers": ("health.straggler_every_steps=1",),
    "tensorboard": ("logging.tensorboard=true",),
    "wandb": ("logging.wandb=offline",),
}
QUIET = ("logging.report_every_seconds=0", "health.straggler_every_steps=0")


@dataclass(frozen=True)
class Run:
    """A run of so many steps. ``between[n]``: names of WATCHERS that come after n steps; ``always``: of ALWAYS.
    ``flips_a_bit``: of one moment, before the last step."""

    overrides: tuple[str, ...]
    always: tuple[str, ...] = ()
    between: tuple[tuple[str, ...], ...] = ((),) * 4
    flips_a_bit: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a rank's run has come to: every step's numbers, and checksums of all tensors at the end, by name."""

    steps: list[dict[str, Any]]
    tensors: dict[str, str]


def differences(run: Outcome, other: Outcome) -> list[str]:
    """Return what differs in anything but time."""
    found = [
        f"step {number}: {name} {mine[name]} / {theirs[name]}"
        for number, (mine, theirs) in enumerate(zip(run.steps, other.steps, strict=True), 1)
        for name in mine
        if mine[name] != theirs[name]
    ]
    names = {**run.tensors, **other.tensors}
    return found + [name for name in names if run.tensors.get(name) != other.tensors.get(name)]


def run_watched(run: Run) -> Outcome:
    """Train on this rank, with the watchers between the steps."""
    torch.set_num_threads(1)
    world = World.from_environment()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(world, torch.device("cpu"), timeout_seconds=120)
        try:
            place = [folder]
            dist.broadcast_object_list(place)
            wanted = [option for name in run.always for option in ALWAYS[name]]
            recipe = compose([*TINY, *QUIET, *run.overrides, *wanted, f"run.directory={place[0]}/run"])
            return _train(_trainer(recipe, world), run)
        finally:
            stop_processes()


def _trainer(recipe: Any, world: World) -> Trainer:
    device = torch.device("cpu")
    parts = build_parts(recipe, recipe.layout(world.size), device)
    parts.watchdog = watchdog_of(recipe, world, device)
    data = build_data(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed)
    data = replace(data, held_out=data.held_out.of_at_most(2))
    return prepare_trainer(parts, data, SilentReporter(), resolved_yaml(recipe))


def _train(trainer: Trainer, run: Run) -> Outcome:
    results: list[StepResult] = []
    original, signals = trainer_module.train_step, StopSignals()

    def keep_result(*arguments: Any) -> StepResult:
        results.append(original(*arguments))
        return results[-1]

    trainer_module.train_step = keep_result
    try:
        for number, names in enumerate(run.between):
            around: list[Any] = []
            if run.flips_a_bit and number == len(run.between) - 1:
                _flip_a_bit(trainer.parts)
            for name in names:
                around.append(WATCHERS[name](trainer) or nullcontext())
            trainer.is_over(signals)  # moves a save under way on
            for context in around:
                context.__enter__()
            trainer.step()
            for context in reversed(around):
                context.__exit__(None, None, None)
        saver_of(trainer).finish(trainer.progress.step)
        if trainer.parts.ema is not None:
            trainer.parts.ema.wait()
    finally:
        trainer_module.train_step = original
        _close(trainer)
    return Outcome([_numbers(result) for result in results], _checksums(trainer.parts))


def _flip_a_bit(parts: Parts) -> None:
    (moments, *_) = parts_of(parts.optimizer)[0].optimizer.state.values()
    moments["exp_avg"].view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def _close(trainer: Trainer) -> None:
    trainer.parts.watchdog.close()
    trainer.journal.close({"before": None}, finished=False)


def objects_after(steps: Sequence[int]) -> list[Counter[str]]:
    """Return the objects alive by kind after so many steps of a run with everything on, watched between all of them.

    The batch shrinks, so that ever new schedules are run, and none longer than the first.
    """
    torch.set_num_threads(1)
    world, found = World(0, 1, 0), []
    with tempfile.TemporaryDirectory() as folder:
        start_processes(world, torch.device("cpu"))
        try:
            always = [option for options in ALWAYS.values() for option in options]
            grows = f"optim.global_batch=[{{until: {steps[-1] * 8 * 16}, shape: linear, at: 14, to: 2}}]"
            fewer = ("model.num_hidden_layers=2", "optim.batch_multiple=1", grows, f"run.steps={steps[-1] + 1}")
            trainer = _trainer(compose([*TINY, *QUIET, *always, *fewer, f"run.directory={folder}/run"]), world)
            for number in range(1, steps[-1] + 1):
                trainer.step()
                evaluate(trainer)
                if number % 5 == 0:
                    save_beside(trainer)
                    saver_of(trainer).finish(number)
                if number in steps:
                    gc.collect()
                    found.append(Counter(type(thing).__name__ for thing in gc.get_objects()))
            _close(trainer)
        finally:
            stop_processes()
    return found


def _numbers(result: StepResult) -> dict[str, Any]:
    measured = {"pipeline_seconds", "bubble_fraction", "memory_peaks", "data_waits"}
    values = {name: value for name, value in asdict(result).items() if name not in measured}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}


def _checksums(parts: Parts) -> dict[str, str]:
    """Return a checksum of every tensor that the next step would read."""
    found = {}
    for stage, chunk in parts.chunks.items():
        for name, parameter in chunk.named_parameters():
            found[f"weight {stage}.{name}"] = parameter
            found[f"gradient {stage}.{name}"] = parameter.main_grad
        found |= {f"buffer {stage}.{name}": buffer for name, buffer in chunk.named_buffers()}
    for number, part in enumerate(parts_of(parts.optimizer)):
        for index, state in enumerate(part.optimizer.state.values()):
            found |= {f"optimizer {number}.{index}.{name}": x for name, x in state.items() if torch.is_tensor(x)}
    found["random generator"] = torch.get_rng_state()
    hooked = {f"hook {name}": "there" for name in _hooked(parts)}
    return {name: _checksum(tensor) for name, tensor in found.items()} | hooked


def _hooked(parts: Parts) -> Iterator[str]:
    """Yield the parameters whose gradient DDP would still be told of, whether or not autograd brings it."""
    for stage, ddp in parts.ddps.items():
        for name, parameter in parts.chunks[stage].named_parameters():
            if torch.autograd.graph.get_gradient_edge(parameter).node in ddp.grad_accs:
                yield f"{stage}.{name}"


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()
