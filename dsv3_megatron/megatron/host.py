"""Preparing a process for megatron-core: its version, this rank's device, and what is adapted for that device.

``adapt_host`` must run before the first megatron import and is called by every module of ours that needs it. What is
adapted depends on the device the run chose, not on what the machine has: a run on the CPU of a machine with GPUs needs
every answer that one without them needs (cpu.py); fixes.py holds what every machine needs. Commands choose with
:func:`choose_device` before they import megatron-core; who builds a model for a device without a choice made is served
by ``build_parts``.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from typing import Literal

import torch

from dsv3_megatron.megatron.cpu import CPU, adapt_to_no_cuda
from dsv3_megatron.megatron.fixes import apply_fixes
from dsv3_megatron.megatron.libraries import share_cudnn
from parallel.errors import LayoutError, PackageError
from parallel.world import World

MEGATRON_CORE = "0.16.1"  # the version whose private functions are adapted here; pyproject.toml pins it too
_state: dict[str, object] = {"adapted": False, "chosen": None}


def gpu_present() -> bool:
    """Return whether torch can use a CUDA device here."""
    return torch.version.cuda is not None and torch.cuda.is_available()


def choose_device(wanted: str, world: World) -> torch.device:
    """Return this rank's device for a recipe's ``run.device``, and prepare this process for it.

    ``auto`` is what the process was prepared for, else a GPU where one is. Raises: LayoutError: a GPU is asked for and
    none is there, or the node has fewer GPUs than ranks.
    """
    if wanted == "cuda" and not gpu_present():
        raise LayoutError("run.device = cuda, but torch finds no GPU here; set run.device=cpu")
    if wanted == "auto":
        wanted = str(_state["chosen"] or ("cuda" if gpu_present() else "cpu"))
    if wanted == "cuda" and world.local_rank >= (count := torch.cuda.device_count()):
        raise LayoutError(
            f"LOCAL_RANK = {world.local_rank}, but torch sees {count} {'GPU' if count == 1 else 'GPUs'} on this node; "
            f"start at most {count} {'process' if count == 1 else 'processes'} here, or set run.device=cpu"
        )
    adapt_host("cuda" if wanted == "cuda" else "cpu")
    return torch.device("cuda", world.local_rank) if wanted == "cuda" else CPU


def adapt_host(device: Literal["cpu", "cuda"] | None = None) -> None:
    """Make megatron-core importable and correct for a device; does the least for a GPU. Idempotent.

    ``device``: what this process trains on. None, as modules say that only import megatron-core: what was chosen
    before, else the CPU where there is no GPU, else nothing yet. The CPU may still be chosen after that (functions that
    megatron-core has compiled by then run as they are written), but not once CUDA is in use, nor a GPU after the CPU.

    Raises: PackageError: megatron-core has another version. LayoutError: the process is prepared for another device.
    """
    if not _state["adapted"]:
        _check_version()
        share_cudnn()
        warnings.filterwarnings("ignore", module=r"megatron\.core.*")
        # torch 2.13 renames three collectives that megatron-core and torch 2.11 know by the old names only.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if device is None and not gpu_present():
        device = "cpu"
    chosen = _state["chosen"]
    if device not in (None, chosen):
        if chosen is not None or (device == "cpu" and gpu_present() and torch.cuda.is_initialized()):
            raise LayoutError(
                f"run.device = {device}, but this process is prepared for {chosen or 'cuda'}; choose in a process of "
                f'its own: dsv3_megatron.megatron.host.adapt_host("{device}") comes before everything else'
            )
        _state["chosen"] = device
        if device == "cpu":
            adapt_to_no_cuda()
    if not _state["adapted"]:
        _state["adapted"] = True
        apply_fixes()


def _check_version() -> None:
    """Raise PackageError unless megatron-core is the version whose private functions are replaced here."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        found = "not installed"
    if found != MEGATRON_CORE:
        raise PackageError(
            f"megatron-core = {found}, but this code replaces private functions of {MEGATRON_CORE} and is proven with "
            f"no other; pip install megatron-core=={MEGATRON_CORE}"
        )
