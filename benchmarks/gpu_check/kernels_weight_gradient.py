"""The kernel for all experts' weight gradients beside one product an expert: the same numbers, and its speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_check.outcome import Outcomes, Visit, judged
from benchmarks.gpu_check.timing import milliseconds

# Name: rows of each expert, O, I. dsv3_150m, and DeepSeek-V3's two layers with 8 experts on a rank of EP 32.
MADE_UP = {
    "odd": ((40, 0, 30, 1, 129), 150, 70),
    "one": ((77,), 64, 264),
}
TIMED = {
    "150m gate_up": ((2048, 4096, 1024, 0) * 8, 512, 512),
    "gate_up": ((3072, 4096, 1024, 0) * 2, 4096, 7168),
    "down": ((3072, 4096, 1024, 0) * 2, 7168, 2048),
}
ALLOWED = 1e-5  # both add up in float32, in another order
PEAK = 989e12  # BF16 operations a second of an H100 or H200


def weight_gradient(visit: Visit) -> Outcomes:
    """The kernel's numbers, twice, beside float32 products an expert; milliseconds of both ways."""
    import torch

    apart: dict[str, float] = {}
    broken: list[str] = []
    for name, (rows, o, i) in (MADE_UP | TIMED).items():
        total, grad, x, ends = _operands(rows, o, i)
        plain, first, second = total.clone(), total.clone(), total.clone()
        _one_by_one(plain, grad, x, rows)()
        _kernel(first, grad, x, ends)()
        _kernel(second, grad, x, ends)()
        apart[name] = ((first - plain).norm() / (plain - total).norm()).item()
        if not torch.equal(first, second):
            broken.append(f"{name}: two runs differ")
        if any(not torch.equal(first[e], total[e]) for e, count in enumerate(rows) if not count):
            broken.append(f"{name}: an expert without rows was changed")
    worst = max(apart, key=lambda name: apart[name])
    good = not broken and all(value <= ALLOWED for value in apart.values())
    bandwidth = 1e9 * visit.found["machine"]["gigabytes_per_second"]["in the device"]
    times = {name: _timed(*case, bandwidth) for name, case in TIMED.items()}
    said = [f"at most {apart[worst]:.0e} apart ({worst})", *broken]
    said += [
        f"{name} {t['kernel_ms']:.2f} ms ({t['of_roofline']:.0%} of the roofline), one by one {t['one_by_one_ms']:.2f}"
        for name, t in times.items()
    ]
    yield judged(good, "; ".join(said), apart=apart, times=times)


def _operands(rows: Sequence[int], o: int, i: int) -> tuple[Any, Any, Any, Any]:
    import torch

    torch.manual_seed(1)
    tokens = sum(rows)
    grad, x = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for width in (o, i))
    ends = torch.tensor(rows).cumsum(0).to(torch.int32).cuda()
    return torch.randn(len(rows), o, i, device="cuda"), grad, x, ends


def _kernel(total: Any, grad: Any, x: Any, ends: Any) -> Callable[[], None]:
    from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients

    return lambda: add_weight_gradients(total, grad, x, ends)


def _one_by_one(total: Any, grad: Any, x: Any, rows: Sequence[int]) -> Callable[[], None]:
    from dsv3_megatron.precision.weight_gradients import add_grouped_product

    return lambda: add_grouped_product(total, grad, x, rows)


def _timed(rows: Sequence[int], o: int, i: int, bandwidth: float) -> dict[str, float]:
    total, grad, x, ends = _operands(rows, o, i)
    served = sum(1 for count in rows if count)
    seconds = max(2 * sum(rows) * o * i / PEAK, (2 * sum(rows) * (o + i) + 8 * served * o * i) / bandwidth)
    kernel = milliseconds(_kernel(total, grad, x, ends), times=10)
    one_by_one = milliseconds(_one_by_one(total, grad, x, rows), times=10)
    return {"kernel_ms": kernel, "one_by_one_ms": one_by_one, "of_roofline": 1e3 * seconds / kernel}
