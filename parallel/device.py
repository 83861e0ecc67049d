"""Devices: whether calls return before their work is done, and how numbers of the host get there unwaited for."""

from __future__ import annotations

import torch
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Return whether calls return before their work is done, so that streams and events say what is done."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on ``device``.

    To a GPU through pinned memory: a copy from other memory lets the host wait until the device has done all that was
    asked of it before. torch keeps the pinned memory until the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
