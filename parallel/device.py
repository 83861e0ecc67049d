"""Whether a device has streams, on which work is queued and done later."""

from __future__ import annotations

import torch


def has_streams(device: torch.device) -> bool:
    """Return whether calls return before their work is done, so that streams and events say what is done."""
    return device.type == "cuda"
