"""Does the moving average of the weights follow them, and leave the training alone while it is saved?"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import train, words

STEPS, SAVE_AT, DECAY = 3, 1, 0.5
ALLOWED = 1e-5  # of the average beside one made by hand, relative: the same float32 operations
NORMS_APART = 2e-2  # kernels may add in another order; lost gradients make a norm several times smaller


def leaves_training_alone(visit: Visit, backend: str, precision: str) -> Outcomes:
    """Train with an average and a save, then without either; beside it the average made by hand from each step's
    weights."""
    plain = words(backend, precision, f"run.steps={STEPS}", "run.resume=never")
    by_hand: dict[str, Any] = {}

    def begin(parts: Any) -> None:
        by_hand.update(_weights(parts))

    def follow(parts: Any) -> None:
        for name, weight in _weights(parts).items():
            by_hand[name].lerp_(weight, 1.0 - DECAY)

    with_average = (*plain, f"optim.ema_decay={DECAY}", f"checkpoint.every_steps={SAVE_AT}")
    seen = train(visit, with_average, visit.scratch / "with", at_start=begin, at_step=follow)
    seen.parts.ema.wait()
    yield verdict(
        seen.norms, train(visit, plain, visit.scratch / "without").norms, _apart(seen.parts.ema.average, by_hand)
    )


def verdict(norms: list[float], without: list[float], apart: float) -> Outcome:
    """Return whether gradient norms are those of the run without an average, and the average is that made by hand."""
    worst = max(abs(a - b) / b for a, b in zip(norms, without, strict=True))
    said = (
        f"norms {' '.join(f'{n:.3f}' for n in norms)} with a save after step {SAVE_AT}, without EMA and saves "
        f"{' '.join(f'{n:.3f}' for n in without)}: {worst:.1e} apart (allowed {NORMS_APART:.0e}); the average is "
        f"{apart:.1e} from one made by hand (allowed {ALLOWED:.0e})"
    )
    good = worst <= NORMS_APART and apart <= ALLOWED
    return judged(good, said, norms=norms, norms_without=without, average_apart=apart)


def _weights(parts: Any) -> dict[str, Any]:
    """Return copies of the parameters in float32, under the names that the average has for them."""
    return {
        f"stage{stage}.{name}": parameter.detach().float().cpu().flatten().clone()
        for stage, chunk in parts.chunks.items()
        for name, parameter in chunk.named_parameters()
    }


def _apart(average: dict[str, Any], by_hand: dict[str, Any]) -> float:
    """Return the largest relative difference of any weight; infinite where one lacks what the other has."""
    if set(average) != set(by_hand):
        return float("inf")
    found = [((average[n] - w).norm() / w.norm().clamp(min=1e-12)).item() for n, w in by_hand.items()]
    return max(found) if all(value == value for value in found) else float("inf")
