"""A small training on Transformer Engine: what tests of the te backend run on ranks that have it (preload=TE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic

from dsv3_megatron.model import te_attention
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.evaluation.scoring import evaluate_batches
from dsv3_megatron.train.facts import run_facts
from dsv3_megatron.train.step import StepValues, train_step
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.te.calls import calls, forget
from testing.training.tiny import VALUES, small_recipe, step_batches_of, whole_gradients

# FP8 rows are multiples of 16 numbers.
WORDS = ("backend=te", "model.qk_rope_head_dim=16")
FP8 = (*WORDS, "precision=fp8")


@dataclass
class Training:
    """One run to do."""

    overrides: tuple[str, ...] = WORDS
    steps: int = 2
    evaluate: bool = False  # before every step
    unfused: str | None = None  # why Transformer Engine would have no fused attention; None = it has one
    values: StepValues = field(default_factory=lambda: VALUES)


def train(case: Training) -> dict[str, Any]:
    """Train on this rank; return what every step measured, and the gradients of the last.

    Memory that nobody has written is NaN.
    """
    recipe, world = small_recipe(*case.overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    answer, te_attention.why_unfused = te_attention.why_unfused, lambda *of_what: case.unfused
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        found: dict[str, Any] = {"losses": [], "mtp": [], "norms": [], "quantised": [], "held_out": []}
        found["backend"] = run_facts(parts)["backend"]

        def keep_gradients(loss: float, norm: float) -> bool:
            found["gradients"] = gradients(parts)
            return True

        for number in range(case.steps):
            batches = step_batches_of(parts, number)
            if case.evaluate:
                found["held_out"].append(evaluate_batches(parts, batches))
            forget()
            result = train_step(parts, batches, case.values, keep_gradients)
            found["losses"].append(result.lm_loss)
            found["mtp"].append(result.mtp_loss)
            found["norms"].append(result.grad_norm)
            found["quantised"].append(len(calls("quantize", tile="128x128")))
        modules = [module for chunk in parts.chunks.values() for module in chunk.modules()]
        found["attention"] = {type(m.core_attention).__name__ for m in modules if hasattr(m, "core_attention")}
        found["wgrads"] = [*calls("gemm", layout="NT"), *calls("grouped_gemm", layout="NT")]
        return found
    finally:
        te_attention.why_unfused = answer
        stop_processes()
        if recipe.backend == "te":
            forget_fp8_state()


def forget_fp8_state() -> None:
    """Begin anew what TE keeps for the whole process: amaxes of delayed scaling, by layer."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def gradients(parts: Parts) -> dict[str, np.ndarray]:
    """Return this rank's reduced gradients by the names that parameters have in the whole model."""
    found = whole_gradients(parts)
    return {name: grad.float().numpy() for name, grad in found.items()}


def untrained(found: dict[str, Any]) -> list[str]:
    """Return the parameters whose gradient is zero, or no number."""
    return [name for name, grad in found["gradients"].items() if not np.isfinite(grad).all() or not grad.any()]


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of a gradient from the expected, by their norms."""
    pairs = [(grad, expected["gradients"][name]) for name, grad in found["gradients"].items()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
