"""The line of metrics.jsonl that a step becomes, for every writer."""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.metrics.step_metrics import StepMetrics
from dsv3_megatron.model.costs import training_flops_per_token
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.expert_load import RunningLoads, max_violation
from dsv3_megatron.train.step import StepResult
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Metrics(Callback):
    """Puts a step's metrics together on rank 0."""

    def __init__(self, recipe: Recipe):
        self._flops_per_token = training_flops_per_token(recipe.model, recipe.data.sequence_length)
        self._running_loads = RunningLoads()
        self._loads_every = recipe.logging.expert_load_every_steps

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Write the step down, and every so often the load of every expert."""
        if not trainer.journal.speaks:
            return
        progress, result = trainer.progress, step.result
        metrics = StepMetrics(
            step=progress.step,
            tokens=progress.tokens,
            samples=progress.samples,
            loss=result.objective,
            lm_loss=result.lm_loss,
            mtp_loss=result.mtp_loss,
            balance_loss=result.balance_loss,
            learning_rate=step.values.learning_rate,
            grad_norm=result.grad_norm,
            global_batch=step.global_batch,
            step_seconds=step.seconds,
            bubble_fraction=result.bubble_fraction,
            max_violation=result.max_violation,
            skipped=progress.skipped,
            memory_peak_bytes=int(result.memory_peaks.max()),
            memory_peak_rank=int(result.memory_peaks.argmax()) if len(result.memory_peaks) > 1 else None,
            **self._speed(trainer, step),
            **self._loads(result),
            max_attention_logit=None if result.logits is None else result.logits.largest.max(1).tolist(),
            clipped_heads=result.clipped_heads,
            **step.columns,
        )
        trainer.journal.step(metrics, trainer.recipe.run.steps)
        if result.loads is not None and progress.step % self._loads_every == 0:
            trainer.journal.loads(progress.step, result.loads)

    def _speed(self, trainer: Trainer, step: CompletedStep) -> dict[str, Any]:
        device, seconds = trainer.parts.device, step.seconds
        tflops = step.tokens * self._flops_per_token / seconds / trainer.parts.layout.world_size / 1e12
        peak = trainer.recipe.cluster.peak_tflops.get("bf16") if device.type == "cuda" else None
        values = {
            "tokens_per_second": step.tokens / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / peak if peak else None,
            "data_seconds": float(step.result.data_waits.max()),
        }
        if device.type == "cpu":  # a GPU's work is done later than the host has asked for it: its parts tell nothing
            pipeline = step.result.pipeline_seconds
            rest = seconds - values["data_seconds"] - pipeline
            values |= {"pipeline_seconds": pipeline, "update_seconds": rest}
        return values

    def _loads(self, result: StepResult) -> dict[str, Any]:
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
