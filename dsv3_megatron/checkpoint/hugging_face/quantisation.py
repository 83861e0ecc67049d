"""How the numbers of published files are quantised: FP8 E4M3 with scales is read, everything else is refused by name.

Source: quantization_config of DeepSeek-V3 and V3.1 (``weight_block_size``, ``scale_fmt``); the names that
compressed-tensors, AWQ, GPTQ, ModelOpt and bitsandbytes give to their tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.checkpoint.hugging_face.config_keys import shown
from dsv3_megatron.checkpoint.hugging_face.headers import Header
from dsv3_megatron.precision.weights import BLOCK, tile_of_scales
from parallel.errors import CheckpointError

FP8 = "F8_E4M3"
READ = ("F32", "BF16", "F16", FP8)  # dtypes of weights
POWERS = ("F8_E8M0", "U8")  # of scales: an exponent, U8 where scale_fmt says so
SCALES = ("_scale_inv", "_scale")  # what ends a scale's name after its weight's; both are factors of the weight
ORIGINAL = "fetch the BF16 or FP8 original"
# What the names of tensors give away, and what dtypes do.
_NAMES = {
    ".weight_packed": "compressed-tensors' packed integers",
    ".qweight": "AWQ's or GPTQ's packed integers",
    ".qzeros": "AWQ's or GPTQ's packed integers",
    ".weight_scale_2": "NVFP4",
    "_blocks": "MXFP4",
    ".SCB": "bitsandbytes' INT8",
    ".absmax": "bitsandbytes' 4 bits",
}
_DTYPES = {
    "F8_E5M2": "FP8 in E5M2",
    "I8": "INT8",
    "U8": "packed 4 bits (NVFP4, MXFP4, bitsandbytes)",
    "F4": "packed 4 bits (NVFP4, MXFP4)",
    "I32": "packed integers (AWQ, GPTQ, compressed-tensors)",
}


@dataclass(frozen=True)
class Quantisation:
    """What a configuration says of scales."""

    block: tuple[int, int] | None = BLOCK  # None: the configuration says that there are no blocks
    is_given: bool = False
    power_of_two: bool = False  # scale_fmt = ue8m0

    def tile(self, weight: tuple[int, ...], scale: Header, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the elements of ``weight`` [N, K] that share a scale of ``shape``. Raises: CheckpointError: none do.

        A block size that the configuration gives is the only one; without it scales are of 128x128 blocks, rows, or
        the whole matrix, as their shape says.
        """
        if scale.dtype not in ("F32", "BF16", "F16", *POWERS) or (scale.dtype == "U8" and not self.power_of_two):
            raise CheckpointError(
                f"{scale.file}: {scale.name} is {scale.dtype}, which no scale is (F32, BF16, F16, F8_E8M0, and U8 "
                f"where scale_fmt = ue8m0); {ORIGINAL}"
            )
        try:
            return tile_of_scales(weight, shape, self.block, or_coarser=not self.is_given or self.block is None)
        except ValueError as error:
            said = f"quantization_config.weight_block_size = {list(self.block) if self.block else None}"
            where = said if self.is_given else "a configuration without weight_block_size"
            raise CheckpointError(f"{scale.file}: {scale.name}: {error} ({where}); fetch the files again") from None


def quantisation_of(config: dict[str, Any]) -> Quantisation:
    """Return what ``quantization_config`` says, of the model or of its text model.

    Raises: CheckpointError: it is another method than FP8 in E4M3, or contradicts itself.
    """
    text = config.get("text_config")
    places = [config, text] if isinstance(text, dict) else [config]
    found = [place[key] for place in places for key in ("quantization_config", "compression_config") if place.get(key)]
    if not found:
        return Quantisation()
    said = found[0]
    if any(other != said for other in found) or not isinstance(said, dict):
        raise CheckpointError("config.json: quantization_config stands there twice and differs, or is none; keep one")
    if (method := said.get("quant_method")) != "fp8":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method = {shown(method)}, but fp8 alone is read; {ORIGINAL} "
            "(or remove quantization_config where the files hold plain numbers)"
        )
    for key, allowed in {"fmt": ("e4m3",), "scale_fmt": ("ue8m0", "float")}.items():
        if said.get(key) not in (None, *allowed):
            raise CheckpointError(
                f"config.json: quantization_config.{key} = {shown(said[key])}, not {allowed}; {ORIGINAL}"
            )
    given = "weight_block_size" in said
    return Quantisation(
        _block(said["weight_block_size"]) if given else BLOCK, given, power_of_two=said.get("scale_fmt") == "ue8m0"
    )


def _block(said: object) -> tuple[int, int] | None:
    if said is None:
        return None
    if isinstance(said, list | tuple) and len(said) == 2 and all(type(size) is int and size > 0 for size in said):
        return said[0], said[1]
    raise CheckpointError(f"config.json: quantization_config.weight_block_size = {shown(said)}; give two sizes above 0")


def refuse_packed(headers: Iterable[Header]) -> None:
    """Raise CheckpointError where the names of tensors are those of a quantisation that is not read."""
    for header in headers:
        for end, kind in _NAMES.items():
            if header.name.endswith(end):
                raise CheckpointError(f"{header.file}: {header.name} looks like {kind}, which is not read; {ORIGINAL}")


def check_dtype(header: Header) -> None:
    """Raise CheckpointError where a weight's numbers are not read in its dtype."""
    if header.dtype in READ:
        return
    kind = f", {_DTYPES[header.dtype]}" if header.dtype in _DTYPES else ""
    raise CheckpointError(
        f"{header.file}: {header.name} is {header.dtype}{kind}; {', '.join(READ)} are read: {ORIGINAL}"
    )
