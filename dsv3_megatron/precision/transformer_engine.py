"""The FP8 policy on Transformer Engine: what megatron-core and TE are told, what they cannot do, and what they need.

megatron-core opens TE's autocast around every layer, with the recipe chosen here. Traps of TE 2.x and megatron-core
0.16: whether scales are powers of two is read from the environment when TE is imported, and the recipe's constructor
arguments of that name do nothing; MTP layers have no place in the count of exempt layers; the overlapped plan opens no
autocast for delayed scaling.
"""

from __future__ import annotations

import os
import re
from importlib import metadata

import torch

from dsv3_megatron.precision.settings import PAPER_TILES, Fp8Settings, PrecisionSettings
from parallel.errors import PackageError, RecipeError

_EXACT_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
_ROUND_SCALES = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"
DEVICES = ("cuda",)  # the device types that TE's kernels run on
OLDEST_TE = (2, 9)
OLDEST_CUDA = (12, 9)


def recipe_name(fp8: Fp8Settings) -> str:
    """Return megatron-core's name of the TE recipe that does what the policy says.

    Raises: RecipeError: TE has none.
    """
    if fp8.tiles == PAPER_TILES:
        return "blockwise"
    if set(fp8.tiles) == {"tensor"}:
        return "delayed" if fp8.scaling == "delayed" else "tensorwise"
    for field, tile, usual in zip(("activation", "weight", "gradient"), fp8.tiles, PAPER_TILES):
        if tile != usual:
            raise RecipeError(
                f"precision.fp8.{field}_tile = {tile} has no recipe in Transformer Engine beside the other tiles; set "
                f"{field}_tile={usual}, all three to tensor, or backend=torch (emulated)"
            )
    raise AssertionError(fp8.tiles)


def check_policy(fp8: Fp8Settings) -> None:
    """Raise RecipeError where the policy asks of TE what only the torch backend does."""
    name = recipe_name(fp8)
    for field, only in (("accumulation", "fp32"), ("wgrad_operands", "requantised")):
        if (value := getattr(fp8, field)) != only:
            raise RecipeError(
                f"precision.fp8.{field} = {value} is emulated by the torch backend only; set {field}={only}, or "
                "backend=torch"
            )
    if name == "delayed":
        _check_delayed(fp8)


def _check_delayed(fp8: Fp8Settings) -> None:
    if fp8.high_precision_layers != (0, 0):
        raise RecipeError(
            f"precision.fp8.high_precision_layers = {list(fp8.high_precision_layers)} cannot go with scaling = delayed "
            "(its amaxes are reduced once for all layers); set scaling=current, or [0,0]"
        )
    if fp8.swiglu_cache == "e4m3":
        raise RecipeError(
            "precision.fp8.swiglu_cache = e4m3 cannot go with scaling = delayed on te (the layer after SwiGLU would "
            "have to quantise its input a second time); set swiglu_cache=high, scaling=current, or backend=torch"
        )
    if fp8.hold_weights:
        raise RecipeError(
            "precision.fp8.hold_weights = true with scaling = delayed would begin AdamW's float32 weights with what "
            "FP8 left of them; set scaling=current, or hold_weights=false"
        )


def prepare_environment(precision: PrecisionSettings) -> None:
    """Tell TE about scales. Must run before TE is imported for the first time: it reads this once."""
    if precision.fp8 is not None:
        os.environ[_EXACT_SCALES] = "0" if precision.fp8.power_of_two_scales else "1"
        os.environ[_ROUND_SCALES] = "1" if precision.fp8.power_of_two_scales else "0"


def check_environment(fp8: Fp8Settings) -> None:
    """Raise PackageError where TE was imported before it was told about scales."""
    from transformer_engine.common import recipe  # an optional package

    if recipe_name(fp8) == "delayed":
        return
    made, name, value = {
        "blockwise": (recipe.Float8BlockScaling, _EXACT_SCALES, 0 if fp8.power_of_two_scales else 1),
        "tensorwise": (recipe.Float8CurrentScaling, _ROUND_SCALES, 1 if fp8.power_of_two_scales else 0),
    }[recipe_name(fp8)]
    if made().fp8_quant_fwd_inp.power_2_scale != fp8.power_of_two_scales:
        raise PackageError(
            f"precision.fp8.power_of_two_scales = {str(fp8.power_of_two_scales).lower()}, but Transformer Engine was "
            f"imported with the opposite; set {name}={value} before starting"
        )


def check_hardware(capability: tuple[int, int], cuda: str | None, te_version: str) -> str | None:
    """Return a line to tell where the GPU does something else, or None.

    Args:
        capability: of the GPU. cuda: what torch was built for. te_version: of the installed Transformer Engine.
    Raises: PackageError: block-scaled FP8 does not run on these.
    """
    shown = ".".join(map(str, capability))
    if _version(te_version) < OLDEST_TE:
        raise PackageError(
            f"precision=fp8 on backend te needs transformer-engine {_dotted(OLDEST_TE)} or newer, installed is "
            f"{te_version}; pip install -e '.[gpu]', or set backend=torch"
        )
    if capability < (9, 0):
        raise PackageError(
            f"precision=fp8 on backend te needs a GPU of compute capability 9.0 or higher, this one has {shown}; set "
            "precision=bf16, or backend=torch (emulated)"
        )
    if cuda is None or _version(cuda) < OLDEST_CUDA:
        raise PackageError(
            f"precision=fp8 on backend te needs torch built for CUDA {_dotted(OLDEST_CUDA)} or newer, this one is for "
            f"{cuda}; install such a torch, or set precision=bf16"
        )
    if capability >= (10, 0):
        return f"compute capability {shown}: Transformer Engine carries out block scaling as MXFP8 (1x32 tiles) there"
    return None


def check_installed(fp8: Fp8Settings, device: torch.device) -> str | None:
    """Check policy, GPU, CUDA and TE of this machine; return a line to tell, or None. Raises: UserError."""
    check_policy(fp8)
    found = check_hardware(
        torch.cuda.get_device_capability(device), torch.version.cuda, metadata.version("transformer-engine")
    )
    check_environment(fp8)
    return found


def configure(config: object, fp8: Fp8Settings | None) -> None:
    """Set megatron-core's configuration for TE's autocast. After construction: the constructor wants TE installed."""
    if fp8 is None:
        return
    config.fp8 = fp8.format  # e4m3 or hybrid: the names are the same
    config.fp8_recipe = recipe_name(fp8)
    config.fp8_param = fp8.hold_weights
    config.fp8_amax_history_len, config.fp8_amax_compute_algo = fp8.delayed_history, "max"
    first, last = fp8.high_precision_layers
    config.first_last_layers_bf16 = bool(first or last)
    config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = first, last


class _WithoutExemptions:
    """A configuration as it stands at any time, but for the first and last layers' exemption from FP8."""

    first_last_layers_bf16 = False

    def __init__(self, config: object):
        self._config = config

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)


def exempt_no_mtp(chunk: torch.nn.Module) -> None:
    """Let no MTP module be taken for one of the first or last layers.

    megatron-core's overlapped plan counts MTP modules from 1 and so leaves them out of FP8 with the first layers, while
    its plain forward leaves out none (0.16.1). Can go when test_mtp_is_in_fp8_under_every_schedule passes without it.
    """
    for layer in chunk.mtp.layers if getattr(chunk, "mtp_process", False) else ():
        for part in (layer, layer.transformer_layer):
            part.config = _WithoutExemptions(part.config)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
