"""This project's own kernels beside the plain code they stand for: equal, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.outcome import Outcomes, Visit, judged
from benchmarks.gpu_check.products import relative
from benchmarks.gpu_check.timing import milliseconds
from dsv3_megatron.precision.kernels import available
from testing.fp8_numbers import KINDS, numbers

TOKENS, HIDDEN, INNER = 32768, 7168, 2048  # of DeepSeek-V3's experts
# BF16's last bit is 2^-8 of a number, and some numbers are at its edge: exponentials are another library's.
ONE_BIT, FEW = 2.0**-7, 0.02


def quantised(visit: Visit) -> Outcomes:
    """Tiles of every kind, special numbers among them: bit for bit the emulation's."""
    import torch

    from dsv3_megatron.precision import tiles
    from dsv3_megatron.precision.formats import E4M3, E5M2

    wrong = []
    for name, x in _cases(visit).items():
        for tile in tiles.KERNEL_TILES:
            for fmt in (E4M3, E5M2):
                found, wanted = tiles.quantise(x, tile, fmt), _plainly(tiles.quantise, x, tile, fmt)
                back, wanted_back = found.dequantise(), _plainly(wanted.dequantise)
                same = {
                    "numbers": torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8)),
                    "scales": torch.equal(found.scale_inv, wanted.scale_inv),
                    "way back": torch.equal(back.nan_to_num(7.0), wanted_back.nan_to_num(7.0)),
                }
                wrong += [
                    f"{what} of {name}, {tile[0]}x{tile[1]} {fmt.name}" for what, equal in same.items() if not equal
                ]
    x = torch.randn(TOKENS, HIDDEN, device=visit.device, dtype=torch.bfloat16)
    took = {f"{a}x{b}": _both(tiles.quantise, x, (a, b)) for a, b in tiles.KERNEL_TILES}
    rate = 3.03 * x.numel() / took["1x128"][0] / 1e6
    said = "bit for bit" if not wrong else f"{len(wrong)} differ: {'; '.join(wrong[:3])}"
    said += f"; {_shown(took)}; 1x128 moves {rate:.0f} GB/s"
    yield judged(not wrong, said, wrong=wrong, milliseconds=took, gigabytes_per_second=rate)


def swiglu(visit: Visit) -> Outcomes:
    """Output, cache and gradients of SwiGLU over an expert's width, with and without the FP8 cache."""
    import torch

    from dsv3_megatron.model.layers.swiglu import SwiGLU

    gate_up = torch.randn(TOKENS, 2 * INNER, device=visit.device, dtype=torch.bfloat16)
    probs = torch.rand(TOKENS, 1, device=visit.device)
    grad = torch.randn(TOKENS, INNER, device=visit.device, dtype=torch.bfloat16)
    wrong, took, facts = [], {}, {}
    for cached in (False, True):
        module = SwiGLU()
        module.cache_in_fp8 = cached

        def step(module: Any = module) -> tuple[Any, ...]:
            x, p = gate_up.detach().requires_grad_(), probs.detach().requires_grad_()
            out = module(x, p)
            out.backward(grad)
            return out.detach(), x.grad, p.grad

        found, wanted = step(), _plainly(step)
        for what, a, b in zip(("output", "gradient", "gradient of probs"), found, wanted, strict=True):
            near = torch.isclose(a.float(), b.float(), rtol=ONE_BIT, atol=1e-5) if what != "gradient of probs" else None
            apart = (a != b).float().mean().item() if near is not None else relative(a, b)
            facts[f"{what}, cached={cached}"] = apart
            if (near is not None and (apart > FEW or not near.all())) or (near is None and apart > 1e-4):
                wrong.append(f"{what}, cached={cached}: {apart:.1e}")
        took["from FP8" if cached else "from BF16"] = _both(step)
    said = "equal but for the last bit of " + f"{max(facts.values()):.1e}" if not wrong else "; ".join(wrong)
    yield judged(not wrong, f"{said}; {_shown(took)}", wrong=wrong, apart=facts, milliseconds=took)


def _cases(visit: Visit) -> dict[str, Any]:
    shape = (520, 1500)
    found = {kind: numbers(kind, shape).bfloat16().to(visit.device) for kind in KINDS}
    plain = found["plain"]
    return found | {"experts": plain.view(4, 130, 1500), "transposed": plain.mT, "float32": plain.float()}


def _plainly(run: Callable[..., Any], *given: Any) -> Any:
    """Return what the plain code makes of it, as on a machine without triton."""
    why_not, available.why_not = available.why_not, lambda: "the plain code is asked for"
    try:
        return run(*given)
    finally:
        available.why_not = why_not


def _both(run: Callable[..., Any], *given: Any) -> tuple[float, float]:
    """Return milliseconds by kernels and by the plain code, the host's time included."""
    return milliseconds(run, *given), _plainly(milliseconds, run, *given)


def _shown(took: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {ours:.2f} ms ({plain:.2f} plainly)" for name, (ours, plain) in took.items())
