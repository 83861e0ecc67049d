"""Training in any layout is training on one process: the comparison."""

from __future__ import annotations

from typing import Any

import pytest


def check(name: str, ranks: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Every rank has the losses (1e-5), gradients (1e-4) and weights (1e-3) of one process, step after step.

    ``ranks``: what train_rank returned on each rank, with a reference; ``found``: what it returned on one process.
    """
    for step, expected in enumerate(found["results"]):
        for rank, mine in enumerate(r["results"][step] for r in ranks):
            where = f"{name}, step {step}, rank {rank}"
            for field in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
                got, want = getattr(mine, field), getattr(expected, field)
                assert got == (want if want is None else pytest.approx(want, rel=1e-5)), (where, field)
    for rank, result in enumerate(ranks):
        for step, errors in enumerate(e for e in result["gradient_errors"] if e):  # none where all of a rank is frozen
            worst = max(errors, key=errors.get)
            assert errors[worst] < 1e-4, (name, "gradient", worst, f"step {step}, rank {rank}", errors[worst])
        worst = max(result["weight_errors"], key=result["weight_errors"].get)
        assert result["weight_errors"][worst] < 1e-3, (name, "weight", worst, rank, result["weight_errors"][worst])
