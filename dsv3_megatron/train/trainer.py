"""The run: batch -> step -> metrics -> checkpoint, until the steps or tokens of the recipe are consumed."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.find import choose_start, find_checkpoint
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.checkpoint.save import Flags, Saver, describe_save
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.build import build as build_data
from dsv3_megatron.data.source.samples import evaluation_batches, step_batches
from dsv3_megatron.health.step_guard import HealthState, StepGuard, nonfinite_gradients, stop_agreed
from dsv3_megatron.health.stop_signals import StopSignals
from dsv3_megatron.health.stragglers import Slowest, WorkClock
from dsv3_megatron.megatron.host import choose_device
from dsv3_megatron.metrics.step_metrics import (
    JsonLines,
    MetricsWriter,
    StepMetrics,
    append_event,
    peak_memory_bytes,
)
from dsv3_megatron.model.backend import backend_name
from dsv3_megatron.model.costs import count_parameters, training_flops_per_token
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.parts import Parts, named_parameters
from dsv3_megatron.preflight.precision import check_precision
from dsv3_megatron.preflight.world import check_world
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.expert_load import RunningLoads, max_violation
from dsv3_megatron.train.start import (
    check_start,
    nothing_to_start_from,
    other_model,
    refuse_other_model,
    starting_candidates,
)
from dsv3_megatron.train.step import StepResult, StepValues, evaluate_batches, train_step
from dsv3_megatron.train.writers import open_writers
from parallel.errors import HealthError
from parallel.groups import start_processes, stop_processes
from parallel.pipeline.watchdog import Watchdog, process_group_store
from parallel.world import World

EARLY_STOP = "asked to stop before the first step: nothing to save, the next start goes on from here"


class Reporter(Protocol):
    """Who tells a person what happens. Called on rank 0 only."""

    def start(self, facts: dict[str, str]) -> None:
        """The run is built and about to train."""

    def step(self, metrics: StepMetrics, last_step: int | None) -> None:
        """A step is done."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The held-out loss was measured."""

    def note(self, text: str) -> None:
        """Something a person should know: resumed, saved, skipped."""


@dataclass
class Progress:
    """Where a run stands; all a resumed run needs beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    health: HealthState = field(default_factory=HealthState)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds."""
        return cls(**{**stored, "health": HealthState(**stored.get("health", {}))})


class Trainer:
    """One rank of a run."""

    def __init__(self, recipe: Recipe, parts: Parts, data: Data, reporter: Reporter, resolved_recipe: str):
        self.recipe, self.parts, self.data = recipe, parts, data
        self.regime = Regime(recipe.optim, recipe.data.sequence_length)
        self.directory = RunDirectory(recipe.run.directory)
        self._take_progress(Progress())
        compares = recipe.health.straggler_every_steps and parts.layout.world_size > 1
        self._clock = WorkClock(list(parts.chunks.values()), parts.device) if compares else None
        self._slowest: Slowest | None = None
        self.is_first = dist.get_rank() == 0
        self.reporter = reporter
        self._resolved_recipe = resolved_recipe
        self._writers: list[MetricsWriter] = []
        self._flops_per_token = training_flops_per_token(recipe.model, recipe.data.sequence_length)
        self._bytes_per_token = data.bytes_per_token() if self.is_first else None
        self.saver = Saver(self.directory.checkpoints, recipe.checkpoint, parts, resolved_recipe, self._tell_save)
        self._running_loads = RunningLoads()

    # -- before the first step -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the run directory, load the newest valid checkpoint if there is one, open the metrics."""
        if self.is_first:
            self.directory.create()
        dist.barrier()
        self._resume()
        if self.is_first:
            layout = self.parts.layout
            self.directory.write_start(self._resolved_recipe, {"size": layout.world_size, "layout": asdict(layout)})
            self._writers = [JsonLines(self.directory.metrics, self.progress.step)]
            if not self.finished:
                self.directory.finished.unlink(missing_ok=True)
            progress = self.progress
            self._writers += open_writers(self.recipe, layout, progress.step, progress.tokens, self.reporter.note)
            self.reporter.start(self._facts())

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        start = choose_start(self.recipe, self.directory.checkpoints, self._tell_damage)
        if (found := start.found) is None:
            if self.recipe.run.start_from:
                self._start_from(self.recipe.run.start_from)
            return
        notes = load_checkpoint(found, self.parts, training=True)
        self._take_progress(Progress.of(found.progress))
        if found.path.parent == self.directory.checkpoints:
            self.saver.saved_step = self.progress.step
        if self.is_first:
            where = f"{found.path} (step {self.progress.step}, {self.progress.tokens:,} tokens)"
            self._event("resumed", {"step": self.progress.step, "path": str(found.path)}, f"resumed from {where}")
            for note in notes:
                self.reporter.note(note)
            if start.changed:
                self._event("recipe_changed", {"changes": start.changed}, f"recipe changed since then: {start.change}")

    def _tell_damage(self, message: str) -> None:
        self._event("damaged", {"reason": message}, f"warning: {message}")

    def _start_from(self, start_from: str) -> None:
        """Begin with the weights of another run, counting anew."""
        found, wrong = find_checkpoint(starting_candidates(start_from) if self.is_first else [])
        if found is None:
            raise nothing_to_start_from(start_from, wrong)
        refused: list[Any] = [None]
        if self.is_first:
            refused = [other_model(found.recipe, self.recipe.model_dump(mode="json"))]
        dist.broadcast_object_list(refused, src=0)
        refuse_other_model(start_from, refused[0])
        notes = load_checkpoint(found, self.parts, training=True)
        if self.is_first:
            self._event("started_from", {"path": str(found.path)}, f"started from {found.path}, counting anew")
            for note in notes:
                self.reporter.note(note)

    def _take_progress(self, progress: Progress) -> None:
        self.progress, self.guard = progress, StepGuard(self.recipe.health, progress.health)

    def _event(self, name: str, values: dict[str, Any], text: str) -> None:
        """Tell a person, and keep it in events.jsonl. On rank 0."""
        self.reporter.note(text)
        append_event(self.directory.events, name, values)

    def _tell_save(self, name: str, values: dict[str, Any]) -> None:
        self._event(name, values, describe_save(name, values))

    def _facts(self) -> dict[str, str]:
        counted = count_parameters(self.recipe.model)
        layout = self.parts.layout
        precision = self.recipe.precision
        return {
            "run": str(self.directory.path),
            "model": f"{counted.main:,} parameters, {counted.activated_per_token:,} active per token"
            + (f", MTP {counted.mtp:,} more" if counted.mtp else ""),
            "layout": f"{layout.world_size} {'rank' if layout.world_size == 1 else 'ranks'}: {layout.describe()}; "
            f"{self._schedule_facts()}",
            "backend": f"{self.parts.backend.name} on {self.parts.device.type}, {precision.name}; {self.parts.adamw}",
        }

    def _schedule_facts(self) -> str:
        if self.parts.layout.pp == 1 and len(self.parts.chunks) == 1:
            return "one stage"
        return f"{self.recipe.parallel.schedule}, layers of stages {list(self.parts.layers_of_stages)}"

    # -- the loop ------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the run has consumed its steps or tokens."""
        run = self.recipe.run
        by_steps = run.steps is not None and self.progress.step >= run.steps
        return by_steps or (run.tokens is not None and self.progress.tokens >= run.tokens)

    def train(self, signals: StopSignals) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop; return the summary. Saves in both cases."""
        start, first_step, before = time.perf_counter(), self.progress.step, None
        with signals:
            over = self.finished or self._asked_to_stop(signals)  # asked while the run was starting
            if not over:
                before = self.evaluate()
            while not (over or self.finished or self._asked_to_stop(signals)):
                self._one_step()
                self._between_steps()
            stopped = not self.finished
        if stopped and self.progress.step == first_step:
            self._tell_early_stop()
        else:
            self.saver.save_finally(asdict(self.progress))
        after = self.evaluate() if not stopped else None
        return self._summarise(before, after, time.perf_counter() - start, stopped)

    def _tell_early_stop(self) -> None:
        if self.is_first:
            self._event("stopped_early", {"step": self.progress.step}, EARLY_STOP)

    def _asked_to_stop(self, signals: StopSignals) -> bool:
        """Return whether any rank was asked to stop; the same exchange moves a save under way on."""
        self.parts.watchdog.enter("the exchange between steps")
        stop, *flags = stop_agreed(signals.wanted, self.parts.device, self.saver.flags())
        self.parts.watchdog.leave()
        self.saver.advance(Flags(*flags), self.progress.step)
        return bool(stop)

    def _one_step(self) -> None:
        recipe, progress, regime = self.recipe, self.progress, self.regime
        start = time.perf_counter()
        batch = regime.global_batch(progress.tokens)
        values = StepValues(
            learning_rate=regime.learning_rate(progress.tokens),
            mtp_weight=regime.mtp_weight(progress.tokens),
            bias_speed=regime.bias_speed(progress.tokens),
            balance_weight=regime.balance_weight(progress.tokens),
            mtp_depth_decay=regime.mtp_depth_decay(progress.tokens),
        )
        batches = step_batches(
            self.data.train,
            first=progress.samples,
            global_batch=batch,
            micro_batch=recipe.optim.micro_batch,
            dp_rank=self.parts.data_rank,
            dp=self.parts.layout.dp,
        )
        data_seconds = time.perf_counter() - start
        result = train_step(self.parts, batches, values, self.guard.allows)
        self.parts.watchdog.leave()
        seconds = time.perf_counter() - start
        tokens = batch * recipe.data.sequence_length
        progress.step += 1
        progress.samples += batch
        progress.tokens += tokens
        progress.skipped += result.skipped
        self._look_for_stragglers()
        if not self.is_first:
            return
        if self.guard.reason:
            why = {"step": progress.step, "reason": self.guard.reason, "in_row": progress.health.skipped_in_row}
            self._event("skipped", why, f"warning: step {progress.step} skipped: {self.guard.reason}")
        world = self.parts.layout.world_size
        tflops = tokens * self._flops_per_token / seconds / world / 1e12
        peak = recipe.cluster.peak_tflops.get("bf16") if self.parts.device.type == "cuda" else None
        metrics = StepMetrics(
            step=progress.step,
            tokens=progress.tokens,
            loss=result.objective,
            lm_loss=result.lm_loss,
            mtp_loss=result.mtp_loss,
            balance_loss=result.balance_loss,
            learning_rate=values.learning_rate,
            grad_norm=result.grad_norm,
            global_batch=batch,
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
            tflops_per_device=tflops,
            mfu=tflops / peak if peak else None,
            bubble_fraction=result.bubble_fraction,
            memory_peak_bytes=peak_memory_bytes(self.parts.device),
            max_violation=result.max_violation,
            **self._load_metrics(result),
            skipped=progress.skipped,
            **self._split_seconds(data_seconds, result.pipeline_seconds, seconds),
            slowest_rank=self._slowest.rank if self._slowest else None,
            slowest_ratio=self._slowest.ratio if self._slowest else None,
        )
        for writer in self._writers:
            writer.write(metrics)
            if result.loads is not None and progress.step % recipe.logging.expert_load_every_steps == 0:
                writer.loads(progress.step, result.loads)
        self.reporter.step(metrics, recipe.run.steps)

    def _split_seconds(self, data: float, pipeline: float, whole: float) -> dict[str, float]:
        if self.parts.device.type != "cpu":
            return {}
        return {"data_seconds": data, "pipeline_seconds": pipeline, "update_seconds": whole - data - pipeline}

    def _load_metrics(self, result: StepResult) -> dict[str, Any]:
        rerouted, dropped = result.overflow or (None, None)
        running = layers = None
        if result.loads is not None:
            loads = torch.from_numpy(result.loads)
            running = max_violation(self._running_loads.update(loads)).mean().item()
            layers = max_violation(loads).tolist()
        return {
            "max_violation_running": running,
            "layer_violation": layers,
            "rerouted_choices": rerouted,
            "dropped_choices": dropped,
        }

    def _between_steps(self) -> None:
        if self.guard.exhausted:
            self._give_up_or_roll_back()
        step, run = self.progress.step, self.recipe.run
        if run.evaluate_every_steps and step % run.evaluate_every_steps == 0 and not self.finished:
            self.evaluate()
        if self.saver.due(step) and not self.finished:
            self.saver.save(asdict(self.progress))

    def _look_for_stragglers(self) -> None:
        if self._clock is None or self.progress.step % self.recipe.health.straggler_every_steps:
            return
        self._slowest = slowest = self._clock.compare()
        if self.is_first and slowest.ratio > self.recipe.health.straggler_ratio:
            text = (
                f"warning: rank {slowest.rank} on {slowest.host} took {slowest.ratio:.1f} times the median rank's time"
            )
            self._event("straggler", {"step": self.progress.step, **asdict(slowest)}, text)

    def _give_up_or_roll_back(self) -> None:
        """After too many skipped steps: go back to the last checkpoint, past the data in between, or end the run."""
        health, limit = self.progress.health, self.recipe.health.skip_limit
        bad = nonfinite_gradients(named_parameters(self.parts))
        what = f"{limit} steps in a row were skipped, the last because {self.guard.reason}"
        what += f"; not finite: the gradient of {', '.join(bad)}" if bad else ""
        if health.rollbacks >= self.recipe.health.rollbacks:
            raise HealthError(
                f"{what}; lower optim.learning_rate, look at the data from sample {self.progress.samples}, or set "
                "health.rollbacks to go back to the last checkpoint and past this data"
            )
        self.saver.finish(self.progress.step)
        candidates = checkpoints(self.directory.checkpoints) if self.is_first else []
        found, wrong = find_checkpoint(candidates)
        if found is None:
            raise HealthError(f"{what}; there is no valid checkpoint to go back to ({'; '.join(wrong) or 'none'})")
        load_checkpoint(found, self.parts, training=True)
        failed_at, samples, rollbacks = self.progress.step, self.progress.samples, health.rollbacks + 1
        self._take_progress(Progress.of(found.progress))
        self.progress.samples, self.progress.health.rollbacks = samples, rollbacks
        self.progress.health.skipped_in_row = 0
        if self.is_first:
            self._writers[0].close()
            self._writers[0] = JsonLines(self.directory.metrics, self.progress.step)
            values = {"step": failed_at, "to_step": self.progress.step, "samples": samples, "rollbacks": rollbacks}
            text = f"warning: {what}; went back to {found.path}, goes on from sample {samples}"
            self._event("rolled_back", values, text)

    def evaluate(self) -> dict[str, float]:
        """Return the held-out loss, in nats per token, and bits per byte where the data is text."""
        batches = evaluation_batches(
            self.data.held_out,
            count=self.data.held_out_count,
            micro_batch=self.recipe.optim.micro_batch,
            dp_rank=self.parts.data_rank,
            dp=self.parts.layout.dp,
        )
        values = {"held_out_loss": evaluate_batches(self.parts, batches)}
        if self._bytes_per_token:
            values["bits_per_byte"] = values["held_out_loss"] / math.log(2) / self._bytes_per_token
        if self.is_first:
            for writer in self._writers:
                writer.event("held_out", {**values, "step": self.progress.step})
            self.reporter.evaluation(self.progress.step, values)
        return values

    def _summarise(self, before: Any, after: Any, seconds: float, stopped: bool) -> dict[str, Any]:
        summary = {
            **{k: v for k, v in asdict(self.progress).items() if k != "health"},
            "seconds": seconds,
            "stopped_by_signal": stopped,
            "before": before,
            "after": after,
        }
        if self.is_first:
            if before or not self.directory.summary.exists():
                self.directory.write_summary(summary)
            if not stopped:
                self.directory.finished.touch()
            for writer in self._writers:
                writer.close()
        return summary


@contextmanager
def processes(world: World, device: torch.device):
    """The default process group, for as long as the block lasts.

    After an error the group of several ranks is left as it is: taking it down waits for messages of ranks that wait for
    this one, or closes their connections, so that they fail before this one has said why. The process must then end
    without ceremony (launcher.pretrain), which ends the others.
    """
    start_processes(world, device)
    try:
        yield
    except BaseException:
        if world.size == 1:
            stop_processes()
        raise
    else:
        stop_processes()


def run(
    recipe: Recipe, world: World, reporter: Reporter, resolved_recipe: str, signals: StopSignals | None = None
) -> dict[str, Any]:
    """Train a recipe on this rank of a world; return the summary.

    ``signals`` may have listened since the process began: a warning that came meanwhile ends the run at the next place
    where ranks can agree on it, with nothing but ``stopped_by_signal`` in the summary if no model was built yet.
    Raises: UserError: what a user can mend, before any process group or data exists where that is possible.
    """
    signals = signals or StopSignals()
    layout = check_world(recipe, world)
    check_start(recipe)
    device = choose_device(recipe.run.device, world)
    told = check_precision(recipe, backend_name(recipe.backend, device), device)
    data = build_data(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed)
    with processes(world, device):
        if _warned(signals, world, device):  # before the minutes that a large model takes to build and to load
            if world.rank == 0:
                reporter.note(EARLY_STOP)
            return {"stopped_by_signal": True}
        parts = build_parts(recipe, layout, device)
        parts.watchdog = Watchdog(
            recipe.run.hang_seconds,
            rank=world.rank,
            world_size=world.size,
            store=process_group_store(),
            abort_seconds=recipe.run.abort_seconds,
            device=device,
        )
        try:
            trainer = Trainer(recipe, parts, data, reporter, resolved_recipe)
            trainer.prepare()
            for line in told if trainer.is_first else ():
                reporter.note(line)
            return trainer.train(signals)
        finally:
            parts.watchdog.close()


def _warned(signals: StopSignals, world: World, device: torch.device) -> bool:
    if world.rank == 0:  # one rank asks the file system for all
        signals.look_back()
    return bool(stop_agreed(signals.wanted, device)[0])
