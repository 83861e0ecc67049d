"""Muon: three steps beside the CPU's, and how fast matrices of DeepSeek-V3's shapes are orthogonalised."""

from __future__ import annotations

from benchmarks.gpu_check.losses import BY_MUON, compared, three_steps, tolerance_of
from benchmarks.gpu_check.outcome import Outcomes, Visit, judged
from benchmarks.gpu_check.timing import milliseconds

# What is multiplied at once: experts of one rank, kv_b, q_b, o.
SHAPES = ((4, 2048, 7168), (1, 32768, 512), (1, 24576, 1536), (1, 7168, 16384))
STEPS = 5
APART = 0.02  # of the norm: products of BF16, summed in other orders, through five steps


def beside_the_cpu(visit: Visit, backend: str, precision: str) -> Outcomes:
    """Each step's loss and gradient norm beside the CPU's by Muon."""
    wanted = visit.found["cpu losses"][f"muon {precision.removesuffix('_held')}"]
    yield compared(three_steps(visit, backend, precision, *BY_MUON), wanted, tolerance_of(backend, precision))


def orthogonalised(visit: Visit) -> Outcomes:
    """Stacks of matrices beside torch's own Newton-Schulz of each, and the rate."""
    import torch
    from torch.optim._muon import _zeropower_via_newtonschulz

    from dsv3_megatron.optim.newton_schulz import orthogonalise, products
    from dsv3_megatron.optim.settings import MuonSettings

    coefficients = MuonSettings().coefficients
    rates, apart = {}, 0.0
    for shape in SHAPES:
        stack = torch.randn(shape, device=visit.device, dtype=torch.bfloat16)
        found = orthogonalise(stack.clone(), STEPS, coefficients)
        theirs = torch.stack([_zeropower_via_newtonschulz(m, coefficients, STEPS, 1e-7) for m in stack])
        apart = max(apart, ((found - theirs).float().norm() / theirs.float().norm()).item())
        took = milliseconds(lambda stack=stack: orthogonalise(stack, STEPS, coefficients))
        rates["x".join(map(str, shape))] = shape[0] * products(*shape[1:], STEPS) / took / 1e9
    said = "; ".join(f"{shape} {rate:.0f} TFLOPS" for shape, rate in rates.items())
    yield judged(apart < APART, f"{said}; beside torch's {apart:.1e} apart", teraflops=rates, apart=apart)
