"""A rank's run with watchers between its steps: what tests/end_to_end/test_watching_changes_nothing.py compares."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import dsv3_megatron.train.build as build_module
import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.checkpoint.find import find_checkpoint
from dsv3_megatron.checkpoint.hugging_face.export import export
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.data.source.build import build as build_data
from dsv3_megatron.data.source.samples import evaluation_batches
from dsv3_megatron.health.stop_signals import StopSignals
from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.report.page import write_report
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.callbacks.evaluation import Evaluation
from dsv3_megatron.train.callbacks.saving import Saving
from dsv3_megatron.train.run import prepare_trainer, watchdog_of
from dsv3_megatron.train.step import StepResult, evaluate_batches
from dsv3_megatron.train.trainer import Callback, Trainer
from launcher.command_line.compose import compose, resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.groups import start_processes, stop_processes
from parallel.pipeline.live_memory import LiveMemory
from parallel.world import World
from tests.tiny import SMALL

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


C = TypeVar("C", bound=Callback)


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
    data = replace(data, held_out_count=2)
    return prepare_trainer(parts, data, SilentReporter(), resolved_yaml(recipe))


def _callback(trainer: Trainer, kind: type[C]) -> C:
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return found


def _saver(trainer: Trainer) -> Saver:
    return _callback(trainer, Saving).saver


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
        _saver(trainer).finish(trainer.progress.step)
        if trainer.parts.ema is not None:
            trainer.parts.ema.wait()
    finally:
        trainer_module.train_step = original
        _close(trainer)
    return Outcome([_numbers(result) for result in results], _checksums(trainer.parts))


def _flip_a_bit(parts: Parts) -> None:
    (moments, *_) = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])[0].optimizer.state.values()
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
                _evaluate(trainer)
                if number % 5 == 0:
                    _save_beside(trainer)
                    _saver(trainer).finish(number)
                if number in steps:
                    gc.collect()
                    found.append(Counter(type(thing).__name__ for thing in gc.get_objects()))
            _close(trainer)
        finally:
            stop_processes()
    return found


def _numbers(result: StepResult) -> dict[str, Any]:
    measured = {"pipeline_seconds", "bubble_fraction"}
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
    for number, part in enumerate(getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])):
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


# -- watchers: called between two steps, on all ranks; what they return is entered around the step that follows --------


def _evaluate(trainer: Trainer) -> None:
    _callback(trainer, Evaluation).evaluate(trainer)


def _save(trainer: Trainer, *, beside: bool = False) -> None:
    saver = _saver(trainer)
    saver.settings = saver.settings.model_copy(update={"asynchronous": beside})
    saver.save(asdict(trainer.progress))


def _save_beside(trainer: Trainer) -> None:
    _save(trainer, beside=True)


def _newest(trainer: Trainer) -> Path:
    """Return the newest complete checkpoint; make one where there is none."""
    folder = trainer.journal.directory.checkpoints
    found = [checkpoints(folder)]
    dist.broadcast_object_list(found)
    if not found[0]:
        _save(trainer)
        found = [checkpoints(folder)]
        dist.broadcast_object_list(found)
    return found[0][0]


def _load_elsewhere(trainer: Trainer) -> None:
    """Fill another model of this process from a checkpoint, the average into its weights, and use it.

    megatron-core knows one set of process groups in a process: the other model shares the run's.
    """
    recipe = trainer.recipe.model_copy(update={"run": trainer.recipe.run.model_copy(update={"seed": 99})})
    found, wrong = find_checkpoint([_newest(trainer)])
    assert found is not None, wrong
    share_groups = replaced(build_module, "build_groups", lambda *unused, **options: trainer.parts.groups)
    with share_groups, torch.random.fork_rng(devices=[]):
        other = build_parts(recipe, trainer.parts.layout, trainer.parts.device)
    load_checkpoint(found, other, training=True)
    if other.ema is not None:
        other.ema.copy_into_weights()
    batches = evaluation_batches(
        trainer.data.held_out, count=2, micro_batch=1, dp_rank=other.data_rank, dp=other.layout.dp
    )
    evaluate_batches(other, batches)


def _load_back(trainer: Trainer) -> None:
    """Save, and fill the run itself from what was saved."""
    _save(trainer)
    found, wrong = find_checkpoint([_newest(trainer)])
    assert found is not None and found.progress["step"] == trainer.progress.step, wrong
    load_checkpoint(found, trainer.parts, training=True)


def _export(trainer: Trainer) -> None:
    path = _newest(trainer)
    if trainer.journal.speaks:
        output = trainer.journal.directory.path / "exported"
        output.mkdir(exist_ok=True)
        export(trainer.recipe.model, path, output, dtype="bf16", shard_bytes=2**30, processes=1)
    dist.barrier()


def _report(trainer: Trainer) -> None:
    if trainer.journal.speaks:
        write_report(trainer.journal.directory.path)


def _profile(trainer: Trainer) -> Any:
    return torch.profiler.profile(record_shapes=True)


def _measure_memory(trainer: Trainer) -> Any:
    return LiveMemory()


WATCHERS: dict[str, Callable[[Trainer], Any]] = {
    "evaluate": _evaluate,
    "save": _save,
    "save beside": _save_beside,
    "load elsewhere": _load_elsewhere,
    "load back": _load_back,
    "export": _export,
    "report": _report,
    "profile": _profile,
    "measure memory": _measure_memory,
}
