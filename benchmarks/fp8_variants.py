"""The trainings that benchmarks/fp8_vs_bf16.py compares: one recipe, seed, text and learning rate; a format each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TENSOR = [f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient")]
VARIANTS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "fp8_paper": ["precision=fp8", "precision.fp8.wgrad_operands=retiled"],
    "fp8_te": ["precision=fp8"],
    "fp8_tensor": ["precision=fp8", *_TENSOR],
    "fp8_gradients_128x128": ["precision=fp8", "precision.fp8.gradient_tile=128x128"],
    "fp8_hybrid_delayed": ["precision=fp8", *_TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.format=hybrid"],
}
MEANING = {
    "fp32": "no FP8, float32 weights",
    "bf16": "no FP8: the reference",
    "fp8_paper": "the paper: 1x128 and 128x128, wgrad's X cut anew from the saved copy",
    "fp8_te": "as Transformer Engine: wgrad's X quantised a second time",
    "fp8_tensor": "one scale a tensor, amax of now",
    "fp8_gradients_128x128": "128x128 for gradients too (diverged at 16B in the paper)",
    "fp8_hybrid_delayed": "one scale a tensor from the last 16 amaxes, E5M2 gradients",
}


def train(name: str, steps: int) -> None:
    """Train one variant, or go on with it."""
    half = steps // 2
    phases = (
        f"[{{until: 20 steps, shape: linear, to: 0.004}},{{until: {half} steps, shape: constant}},"
        f"{{until: {steps} steps, shape: cosine, to: 0.0004}}]"
    )
    command = [sys.executable, "launcher/pretrain.py", "recipe=dsv3_tiny", *VARIANTS[name], f"run.steps={steps}"]
    command += [f"optim.learning_rate={phases}", "logging.wandb=disabled", f"run.directory={directory(name, steps)}"]
    command += ["checkpoint.every_steps=50", "checkpoint.keep=1", "run.seed=1234"]
    log = directory(name, steps).parent / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as out:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=out, stderr=subprocess.STDOUT)


def directory(name: str, steps: int) -> Path:
    """Return the run directory of a variant."""
    return ROOT / "runs" / f"fp8_vs_bf16_{steps}" / name
