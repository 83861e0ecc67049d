"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsv3_megatron.health.step_guard import HealthState


@dataclass
class Progress:
    """All that a resumed run needs beside weights, optimizer and extra states: plain numbers, kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    health: HealthState = field(default_factory=HealthState)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds."""
        return cls(**{**stored, "health": HealthState(**stored.get("health", {}))})
