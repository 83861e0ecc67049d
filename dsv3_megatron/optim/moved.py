"""What a changed recipe makes of a run that goes on: curves whose next value, or whose phase's end, is another."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.optim.regime import Curve, Regime
from parallel.units import show_count


@dataclass(frozen=True)
class Moved:
    """A curve that moved. ``then`` and ``now``: its value for the next step under the stored recipe and under this one.

    ``end_then``, ``end_now``: tokens at which the phase that the next step lies in ends; None after the last phase, and
    where there are none. A phase counted in steps ends elsewhere when the batch is another.
    """

    key: str
    then: float
    now: float
    end_then: int | None
    end_now: int | None

    def __str__(self) -> str:
        parts = []
        if self.then != self.now:
            parts.append(f"{self.now:.4g} for the next step, and would have been {self.then:.4g}")
        if self.end_then != self.end_now:
            parts.append(f"its phase ends {_end(self.end_now)}, and would have ended {_end(self.end_then)}")
        return f"{self.key}: {'; '.join(parts)}"


def moved_curves(then: Regime, now: Regime, tokens: int) -> list[Moved]:
    """Return the curves that are not the same any more for the step that begins after ``tokens`` tokens."""
    before, after = then.curves(), now.curves()
    values_then, values_now = _values(then, before, tokens), _values(now, after, tokens)
    found = [
        Moved(f"optim.{name}", values_then[name], values_now[name], end_of(before[name], tokens), end_of(curve, tokens))
        for name, curve in after.items()
    ]
    return [curve for curve in found if curve.then != curve.now or curve.end_then != curve.end_now]


def end_of(curve: Curve, tokens: int) -> int | None:
    """Return where the phase ends that ``tokens`` tokens lie in, in tokens; None after the last."""
    return next((piece.end for piece in curve.pieces if tokens < piece.end), None)


def _values(regime: Regime, curves: dict[str, Curve], tokens: int) -> dict[str, float]:
    values = {name: curve(tokens) for name, curve in curves.items()}
    return values | {"global_batch": regime.global_batch(tokens)}  # in multiples of what a step takes


def _end(tokens: int | None) -> str:
    return "with the run" if tokens is None else f"at {show_count(tokens)} tokens"
