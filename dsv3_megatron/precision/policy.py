"""Which tensor is in which format: the policy of a recipe, declared once, shown as a table.

Source: arXiv 2412.19437 section 3.3. Linear layers multiply in FP8; the router's gate, norms, embedding, output head
and the attention core stay in the parameters' format; master weights and gradients are float32. What carries it out:
model/fp8.py for the torch backend, precision/transformer_engine.py for Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.precision.settings import Fp8Settings, PrecisionSettings


@dataclass(frozen=True)
class Row:
    """The format of one class of tensors."""

    tensor: str
    format: str
    tile: str = "-"
    scale: str = "-"
    rounding: str = "nearest even"


def policy(precision: PrecisionSettings) -> tuple[Row, ...]:
    """Return the format of every class of tensors under a recipe's precision.

    Where Transformer Engine does otherwise, precision.transformer_engine.deviations tells.
    """
    high = precision.parameters
    return (
        *_linear_rows(precision.fp8, high),
        *_cache_rows(precision.fp8, high),
        Row("dispatch: tokens to experts, and combine's gradients", *_sent(precision.fp8, high)),
        Row("combine: outputs from experts, and dispatch's gradients", high),
        Row("attention core (softmax)", f"fp32 inside, {high} in and out"),
        Row("router gate", "fp32"),
        Row("norms", f"fp32 inside, {high} in and out"),
        Row("embedding", high),
        Row("output head", high),
        Row("pipeline sends", high),
        Row("master weights", "fp32"),
        Row("gradient accumulation and reduction", "fp32"),
        Row("moments, momentum", precision.moments),
    )


def _linear_rows(fp8: Fp8Settings | None, high: str) -> Iterator[Row]:
    classes = ("linear inputs", "linear inputs kept for wgrad", "linear weights", "gradients of linear outputs")
    if fp8 is None:
        yield from (Row(name, high) for name in classes)
        return
    scale = "amax now" if fp8.scaling == "current" else f"largest amax of {fp8.delayed_history} uses"
    scale += ", power of two" if fp8.power_of_two_scales else ", exact"
    along_tokens = {"1x128": "128x1"}
    gradient = "e5m2" if fp8.format == "hybrid" else "e4m3"
    kept = "1x128, cut to 128x1 in backward" if fp8.wgrad_operands == "retiled" else None
    rounding = "nearest even, saturating"
    yield Row(classes[0], "e4m3", fp8.activation_tile, scale, rounding)
    tile = kept or along_tokens.get(fp8.activation_tile, fp8.activation_tile)
    yield Row(classes[1], "e4m3", tile, scale, rounding)
    yield Row(classes[2], "e4m3", fp8.weight_tile, scale, rounding)
    yield Row("linear weights between products", "e4m3 only" if fp8.hold_weights else high)
    tiles = fp8.gradient_tile
    yield Row(classes[3], gradient, f"{tiles} dgrad, {along_tokens.get(tiles, tiles)} wgrad", scale, rounding)


def _cache_rows(fp8: Fp8Settings | None, high: str) -> Iterator[Row]:
    swiglu, attention = "cached input of SwiGLU", "cached input of the linear after attention"
    scale = "amax now, power of two"
    if fp8 is None or fp8.swiglu_cache == "high":
        yield Row(swiglu, high)
    else:
        yield Row(swiglu, "e4m3", "1x128", scale, "nearest even, saturating")
    if fp8 is None:
        yield Row(attention, high)
    elif fp8.attention_output_cache == "high":
        yield Row(attention, f"e4m3, as other linear inputs; {high} for the attention")
    elif fp8.attention_output_cache == "once":
        yield Row(attention, f"{high}, one copy", "128x1, cut in backward")
    else:
        yield Row(attention, "e5m6", "1x128, cut to 128x1 in backward", scale, "nearest even, saturating")


def _sent(fp8: Fp8Settings | None, high: str) -> tuple[str, ...]:
    return ("e4m3", "1x128", "amax now, power of two") if fp8 and fp8.dispatch == "e4m3" else (high,)


def module_class(name: str) -> str:
    """Return what kind of module a parameter belongs to, by its name in the model."""
    for part, kind in (
        ("router", "router gate"),
        ("layernorm", "norm"),
        ("layer_norm_weight", "norm"),
        ("enorm", "norm"),
        ("hnorm", "norm"),
        ("word_embeddings", "embedding"),
        ("output_layer", "output head"),
        ("linear_", "linear"),
        ("eh_proj", "linear"),
    ):
        if part in name:
            return kind
    raise ValueError(f"{name}: no class of the precision policy")


def layer_is_exempt(fp8: Fp8Settings, layer: int | None, layers: int) -> bool:
    """Return whether a decoder layer (from 0; None = an MTP module) stays in high precision."""
    first, last = fp8.high_precision_layers
    return layer is not None and (layer < first or layer >= layers - last)
