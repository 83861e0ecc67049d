"""The places where this project asks for a GPU before it uses Transformer Engine, answered for a CPU."""

from __future__ import annotations

from dsv3_megatron.model import te_attention
from dsv3_megatron.precision import transformer_engine

asked_of_te = te_attention.why_unfused  # the question itself, for its own test


def let_te_run_on_a_cpu() -> None:
    """Let ``backend=te`` stand on ``run.device=cpu``; ``backend=auto`` stays with torch there."""
    transformer_engine.DEVICES = ("cuda", "cpu")
    transformer_engine.check_hardware = lambda capability, cuda, te_version: None
    # A Hopper's answer: its fused kernel is not here, and TE's unfused attention plays it (machine.py).
    te_attention.why_unfused = lambda *of_what: None
