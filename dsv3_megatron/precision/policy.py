"""Which tensor is in which format: the policy of a recipe, declared once, applied to modules and shown as a table.

Source: arXiv 2412.19437 section 3.3. Linear layers multiply in FP8; the router's gate, norms, embedding, output head
and the attention core stay in the parameters' format; master weights and gradients are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv3_megatron.precision.products import EmulatedFp8
from dsv3_megatron.precision.settings import Fp8Settings, PrecisionSettings


@dataclass(frozen=True)
class Row:
    """The format of one class of tensors."""

    tensor: str
    format: str
    tile: str = "-"
    scale: str = "-"
    rounding: str = "nearest even"


def policy(precision: PrecisionSettings, *, fp8_dispatch: bool = False) -> tuple[Row, ...]:
    """Return the format of every class of tensors under a recipe's precision."""
    high, fp8 = precision.parameters, precision.fp8
    rows = [*_linear_rows(fp8, high)]
    dispatched = Row("dispatched activations", high)
    if fp8_dispatch:
        dispatched = Row("dispatched activations", "e4m3", "1x128", "power of two")
    rows += [
        dispatched,
        Row("combined activations", high),
        Row("attention core (softmax)", "fp32 inside, " + high + " in and out"),
        Row("router gate", "fp32"),
        Row("norms", "fp32 inside, " + high + " in and out"),
        Row("embedding", high),
        Row("output head", high),
        Row("pipeline sends", high),
        Row("master weights", "fp32"),
        Row("gradient accumulation and reduction", "fp32"),
        Row("AdamW moments", precision.moments),
    ]
    return tuple(rows)


def _linear_rows(fp8: Fp8Settings | None, high: str) -> Iterator[Row]:
    classes = ("linear inputs", "linear inputs kept for wgrad", "linear weights", "gradients of linear outputs")
    if fp8 is None:
        yield from (Row(name, high) for name in classes)
        return
    scale = "amax now, power of two" if fp8.power_of_two_scales else "amax now, exact"
    along_tokens = {"1x128": "128x1"}
    gradient = "e5m2" if fp8.format == "hybrid" else "e4m3"
    kept = "1x128, cut to 128x1 in backward" if fp8.wgrad_operands == "retiled" else None
    yield Row(classes[0], "e4m3", fp8.activation_tile, scale)
    yield Row(classes[1], "e4m3", kept or along_tokens.get(fp8.activation_tile, fp8.activation_tile), scale)
    yield Row(classes[2], "e4m3", fp8.weight_tile, scale)
    tiles = fp8.gradient_tile
    yield Row(classes[3], gradient, f"{tiles} dgrad, {along_tokens.get(tiles, tiles)} wgrad", scale)


def module_class(name: str) -> str:
    """Return what kind of module a parameter belongs to, by its name in the model."""
    for part, kind in (
        ("router", "router gate"),
        ("layernorm", "norm"),
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


def apply_fp8(chunk: torch.nn.Module, fp8: Fp8Settings | None, *, first_layer: int, layers: int) -> int:
    """Give every linear layer of a stage that the policy puts into FP8 its products; return how many there are.

    Args:
        chunk: a stage on the torch backend (Transformer Engine's layers have their own autocast).
        first_layer: number of its first decoder layer, from 0.
        layers: decoder layers of the whole model.
    """
    if fp8 is None:
        return 0
    count = 0
    for name, module in chunk.named_modules():
        if not hasattr(module, "products") or module_class(f"{name}.") != "linear":
            continue
        parts = name.split(".")
        number = int(parts[2]) + first_layer if parts[:2] == ["decoder", "layers"] else None
        if not layer_is_exempt(fp8, number, layers):
            module.products = EmulatedFp8(fp8)
            count += 1
    return count
