"""FP8 products of this machine beside the emulation, which is exact about every FP8 number and scale."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit, judged, skipped

TOKENS, WIDTH_IN, WIDTH_OUT = 512, 1536, 2048
SPLITS = (128, 0, 16, 368)  # rows of each expert; TE pads an expert's rows to 16
ALLOWED = 4e-3  # a product rounded to BF16 differs by 2e-3 from itself; wrong scales or tiles by 3e-2 and more


def as_emulated(visit: Visit, backend: str, precision: str) -> Outcomes:
    """The three products of a linear layer (and on te of grouped experts): Y, dX, dW."""
    if backend == "te":
        yield _verdict("te.Linear", *_of_te_linear(visit), "te.GroupedLinear", *_of_te_experts(visit))
        return
    import torch

    from dsv3_megatron.precision.hopper import HopperFp8, why_not
    from dsv3_megatron.precision.settings import Fp8Settings

    if why := why_not(Fp8Settings(), torch.device(visit.device)):
        yield skipped(f"torch's block-scaled products are not used here: {why}; FP8 is emulated")
        return
    x, weight, dy = _operands(visit)
    yield _verdict("scaled_mm", _products(HopperFp8(Fp8Settings()), x, weight, dy), _emulated(x, weight, dy))


def _verdict(*named: Any) -> Outcome:
    """Return the verdict over name, found, wanted, name, found, wanted ..."""
    apart = {}
    for name, found, wanted in zip(named[::3], named[1::3], named[2::3], strict=True):
        apart |= {f"{name} {what}": relative(a, b) for what, a, b in zip(("Y", "dX", "dW"), found, wanted, strict=True)}
    worst = max(apart, key=apart.get)
    good = all(value <= ALLOWED for value in apart.values())
    return judged(
        good, f"beside the emulation at most {apart[worst]:.1e} apart ({worst}), allowed {ALLOWED:.0e}", **apart
    )


def relative(found: Any, wanted: Any) -> float:
    """Return |found - wanted| / |wanted|; infinite where something is no number."""
    value = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
    return value if value == value else float("inf")


def _operands(visit: Visit) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    shapes = (TOKENS, WIDTH_IN), (WIDTH_OUT, WIDTH_IN), (TOKENS, WIDTH_OUT)
    x, weight, dy = (torch.randn(s, generator=generator).bfloat16().to(visit.device) for s in shapes)
    return x, weight * 0.02, dy


def _products(products: Any, x: Any, weight: Any, dy: Any) -> tuple[Any, Any, Any]:
    """Return Y, dX, dW by one of dsv3_megatron.precision's products."""
    import torch

    y, kept = products.forward(x, weight, None, None)
    dx, dy_kept = products.input_gradient(dy, weight, None)
    dw = torch.zeros(weight.shape, device=weight.device)
    products.add_weight_gradient(dw, dy_kept, products.operand_for_weight_gradient(kept, None), None, None)
    return y, dx, dw


def _emulated(x: Any, weight: Any, dy: Any) -> tuple[Any, Any, Any]:
    from dsv3_megatron.precision.products import Fp8Products
    from dsv3_megatron.precision.settings import Fp8Settings

    return _products(Fp8Products(Fp8Settings()), x, weight, dy)


def quantised_as_emulated(visit: Visit) -> Outcomes:
    """TE's quantiser beside the emulation, bit for bit: numbers and scales, by rows and by columns."""
    import torch

    x, weight, _ = _operands(visit)
    cases = {
        "activations": x,
        "weights": weight,
        "partial tiles": x[:496, :1488].contiguous(),
        "tiny": x * 1e-30,
        "zeros": torch.zeros_like(x),
    }
    wrong = [
        f"{name}, tiles {tile[0]}x{tile[1]}: {what}"
        for tile in ((1, 128), (128, 128))
        for name, tensor in cases.items()
        for what in _differences(tensor, tile)
    ]
    said = f"{2 * len(cases)} tensors bit for bit, by rows and by columns" if not wrong else "; ".join(wrong[:4])
    yield judged(not wrong, said, wrong=wrong)


def _differences(tensor: Any, tile: tuple[int, int]) -> list[str]:
    """Return which parts of TE's quantised tensor are not the emulation's."""
    import torch
    import transformer_engine.pytorch as te

    from dsv3_megatron.precision.tiles import quantise

    quantiser = te.Float8BlockQuantizer(
        te.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        force_pow_2_scales=True,
        block_scaling_dim=1 if tile[0] == 1 else 2,
    )
    found = quantiser(tensor)
    rows, columns = quantise(tensor, tile), quantise(tensor.t().contiguous(), tile)
    scales = found._rowwise_scale_inv.t() if tile[0] == 1 else found._rowwise_scale_inv  # TE pads them
    same = {
        "numbers by rows": torch.equal(found._rowwise_data.view(torch.uint8), rows.data.view(torch.uint8)),
        "numbers by columns": torch.equal(found._columnwise_data.view(torch.uint8), columns.data.view(torch.uint8)),
        "scales": torch.equal(scales[: rows.scale_inv.shape[0], : rows.scale_inv.shape[1]], rows.scale_inv),
    }
    return [what for what, equal in same.items() if not equal]


def _blockwise() -> Any:
    """Return TE's autocast with block scaling, under whichever of its names this version has."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe.Float8BlockScaling())
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe.Float8BlockScaling())


def _of_te_linear(visit: Visit) -> tuple[tuple, tuple]:
    import torch
    import transformer_engine.pytorch as te

    x, weight, dy = _operands(visit)
    layer = te.Linear(WIDTH_IN, WIDTH_OUT, bias=False, params_dtype=torch.bfloat16, device=visit.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
    x.requires_grad_()
    with _blockwise():
        y = layer(x)
    y.backward(dy)
    return (y.detach(), x.grad, layer.weight.grad), _emulated(x.detach(), weight, dy)


def _of_te_experts(visit: Visit) -> tuple[tuple, tuple]:
    import torch
    import transformer_engine.pytorch as te

    x, _, dy = _operands(visit)
    layer = te.GroupedLinear(
        len(SPLITS), WIDTH_IN, WIDTH_OUT, bias=False, params_dtype=torch.bfloat16, device=visit.device
    )
    x.requires_grad_()
    with _blockwise():
        y = layer(x, list(SPLITS))
    y.backward(dy)
    rows = zip(x.detach().split(SPLITS), dy.split(SPLITS), strict=True)
    weights = [getattr(layer, f"weight{expert}") for expert in range(len(SPLITS))]
    wanted = [_emulated(a, w.detach(), b) for (a, b), w in zip(rows, weights, strict=True) if len(a)]
    served = [w.grad for w, n in zip(weights, SPLITS, strict=True) if n]
    y_wanted, dx_wanted, dw_wanted = zip(*wanted, strict=True)
    return (y.detach(), x.grad, torch.cat(served)), (torch.cat(y_wanted), torch.cat(dx_wanted), torch.cat(dw_wanted))
