"""Delayed scaling: the scale of a tensor from the largest amax of its last uses, as FP8 was first trained with.

One history a layer and role (input, weight, gradient), one entry a use. The first use has none and takes its own amax.
Histories are not part of checkpoints: after a resume the first use takes its own amax again. For studying; the paper
scales by the tile's amax of the moment (arXiv 2412.19437 section 3.3.2, "online quantization").
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from dsv3_megatron.precision.tiles import largest_of_tiles, whole_tile


class AmaxHistory:
    """The amaxes of one tensor's last uses."""

    def __init__(self, length: int):
        self._seen: deque[Tensor] = deque(maxlen=length)

    def amax_for(self, x: Tensor, *, note: bool = True) -> Tensor:
        """Return the amax to scale x [..., A, B] by, [..., 1, 1], and note x's own for later uses."""
        own = largest_of_tiles(x.detach().nan_to_num(0.0), whole_tile(x, (0, 0)))
        earlier = torch.stack(list(self._seen)).amax(0) if self._seen else own
        if note:
            self._seen.append(own)
        return earlier
