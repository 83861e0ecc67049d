"""Three steps of every backend and precision, beside the same steps on this machine's CPU."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged
from benchmarks.gpu_check.tiny import stepper, words

STEPS = 3
BY_MUON = ("optim.name=muon", "optim.muon.arithmetic=bf16")  # as GPUs have it, on both sides


@dataclass(frozen=True)
class Tolerance:
    """How far losses and gradient norms may lie from the CPU's, relative; the first step apart, as nothing was
    trained before it."""

    first: float
    later: float
    norm: float
    why: str


# Each is some three times what was found on a CPU between float32 and BF16, BF16 and FP8, or the backends; and below a
# loss that is wrong by 0.01 of its 6.2.
EXACT = Tolerance(1e-5, 2e-4, 2e-3, "sums in another order; AdamW's first steps follow the signs of small gradients")
TF32 = Tolerance(1e-4, 5e-4, 1e-2, "Transformer Engine may multiply float32 as TF32, 10 bits of mantissa")
ROUNDED = Tolerance(2e-4, 7e-4, 2e-2, "sums rounded to BF16 at other places")
QUANTISED = Tolerance(5e-4, 1.4e-3, 5e-2, "a number at a rounding edge of FP8 falls to either side")


def tolerance_of(backend: str, precision: str) -> Tolerance:
    """Return how exactly a GPU's losses must be the CPU's."""
    if precision == "fp32":
        return TF32 if backend == "te" else EXACT
    return ROUNDED if precision == "bf16" else QUANTISED


def three_steps(visit: Visit, backend: str, precision: str, *more: str) -> dict[str, list[float]]:
    """Return losses and gradient norms."""
    with stepper(visit, words(backend, precision, *more)) as step:
        results = [step() for _ in range(STEPS)]
    return {"losses": [r.lm_loss for r in results], "norms": [r.grad_norm for r in results]}


def reference(visit: Visit) -> Outcomes:
    """The CPU's own, with the torch backend: what the whole test suite holds to account."""
    on_cpu = Visit("cpu", 1, visit.logs, visit.scratch)
    found = {precision: three_steps(on_cpu, "torch", precision) for precision in ("fp32", "bf16", "fp8")}
    found |= {f"muon {precision}": three_steps(on_cpu, "torch", precision, *BY_MUON) for precision in ("bf16", "fp8")}
    yield judged(True, "; ".join(f"{p} {_shown(f['losses'])}" for p, f in found.items()), **found)


def beside_the_cpu(visit: Visit, backend: str, precision: str) -> Outcomes:
    """Each step's loss and gradient norm beside the CPU's. Weights held in FP8 are beside the CPU's FP8."""
    wanted = visit.found["cpu losses"][precision.removesuffix("_held")]
    yield compared(three_steps(visit, backend, precision), wanted, tolerance_of(backend, precision))


def compared(
    found: dict[str, list[float]], wanted: dict[str, list[float]], within: Tolerance, beside: str = "CPU"
) -> Outcome:
    """Return the verdict over losses and norms ``found``, and those ``beside`` them."""
    loss = [_apart(a, b) for a, b in zip(found["losses"], wanted["losses"], strict=True)]
    norm = [_apart(a, b) for a, b in zip(found["norms"], wanted["norms"], strict=True)]
    good = loss[0] <= within.first and max(loss[1:]) <= within.later and max(norm) <= within.norm
    said = (
        f"{_shown(found['losses'])}, {beside} {_shown(wanted['losses'])}: {loss[0]:.1e} apart, "
        f"then {max(loss[1:]):.1e}, norms {max(norm):.1e} "
        f"(allowed {within.first:.0e}, {within.later:.1e}, {within.norm:.0e})"
    )
    return judged(good, said, **found, beside=wanted, loss_apart=loss, norm_apart=norm, tolerance=vars(within))


def _apart(found: float, wanted: float) -> float:
    """Return the relative difference; infinite for what is no number, so that it fails."""
    difference = abs(found - wanted) / abs(wanted)
    return difference if difference == difference else float("inf")


def _shown(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
