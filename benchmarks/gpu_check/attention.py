"""Which kernel serves DeepSeek-V3's attention in BF16: 192 channels for queries and keys, 128 for values."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.outcome import Outcomes, Visit, judged
from benchmarks.gpu_check.timing import milliseconds

HEADS, LENGTH, WIDTH, VALUE = 128, 4096, 192, 128


def backends(visit: Visit) -> Outcomes:
    """Each of torch's backends, forward and backward, alone; torch's own choice; and TE's, which is to be fused."""
    from importlib.util import find_spec

    from dsv3_megatron.megatron.libraries import share_cudnn

    share_cudnn()  # as every run does

    found = {name: _torch(visit, name) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", None)}
    chosen = found.pop(None)
    te, fused = _of_te(visit) if find_spec("transformer_engine") else ("not installed", True)
    served = {name: value for name, value in found.items() if isinstance(value, float)}
    shown = (
        ", ".join(f"{name.split('_')[0].lower()} {ms:.2f} ms" for name, ms in served.items())
        or "none but the plain one"
    )
    own = f"{chosen:.2f} ms" if isinstance(chosen, float) else chosen
    said = f"torch serves it by {shown}, of its own choice in {own}; te: {te}"
    yield judged(isinstance(chosen, float) and fused, said, torch=found, chosen=chosen, te=te)


def _inputs(visit: Visit, layout: tuple[int, ...]) -> list[Any]:
    """Return query, key and value; ``layout`` is their shape but for the channels."""
    import torch

    return [
        torch.randn((*layout, width), device=visit.device, dtype=torch.bfloat16, requires_grad=True)
        for width in (WIDTH, WIDTH, VALUE)
    ]


def _torch(visit: Visit, name: str | None) -> float | str:
    """Return milliseconds of a forward and a backward, or why the backend does not serve it."""
    from contextlib import nullcontext

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = _inputs(visit, (1, HEADS, LENGTH))
    try:
        with sdpa_kernel([getattr(SDPBackend, name)]) if name else nullcontext():
            return milliseconds(
                lambda: (
                    torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
                )
            )
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:200]


def _of_te(visit: Visit) -> tuple[str, bool]:
    """Return what TE's attention says and takes, and whether it is a fused one."""
    import torch
    import transformer_engine.pytorch as te

    from dsv3_megatron.model.te_attention import why_unfused

    unfused = why_unfused(HEADS, WIDTH, VALUE, torch.bfloat16, torch.device(visit.device))
    layer = te.DotProductAttention(HEADS, (WIDTH, VALUE), qkv_format="sbhd", attn_mask_type="causal").to(visit.device)
    query, key, value = _inputs(visit, (LENGTH, 1, HEADS))
    took = milliseconds(lambda: layer(query, key, value).sum().backward())
    if unfused is None:
        return f"fused in {took:.2f} ms", True
    return f"no fused kernel ({unfused}), {took:.2f} ms; backend te takes torch's", False
