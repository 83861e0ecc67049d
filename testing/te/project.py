"""The two places where this project asks for a GPU before it uses Transformer Engine, answered for a CPU."""

from __future__ import annotations

from dsv3_megatron.precision import transformer_engine


def let_te_run_on_a_cpu() -> None:
    """Let ``backend=te`` stand on ``run.device=cpu``; ``backend=auto`` stays with torch there."""
    transformer_engine.DEVICES = ("cuda", "cpu")
    transformer_engine.check_hardware = lambda capability, cuda, te_version: None
