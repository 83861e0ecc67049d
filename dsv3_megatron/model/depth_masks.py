"""Which positions count in the loss of each multi-token-prediction depth.

Depth k at position i predicts label i + k. That counts where the label counts and lies in the same document: neither
past the end of the sequence nor across the boundary of a packed document. megatron-core rolls one mask along with the
labels, which knows no boundaries; here the mask of every depth is made beforehand, and rolling means taking the next
(host.py's _take_masks_by_depth). Made from whole sequences, so that context-parallel ranks only slice them.

Legend: B microbatch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEY = "mtp_mask_"  # of a batch: mtp_mask_1, mtp_mask_2, ...


def with_depth_masks(batch: dict[str, Tensor], depths: int) -> dict[str, Tensor]:
    """Return the batch with a mask [B, S] for every depth 1 to ``depths``."""
    found = dict(batch)
    for depth in range(1, depths + 1):
        mask = torch.zeros_like(batch["loss_mask"])
        mask[:, :-depth] = batch["loss_mask"][:, depth:]
        if "documents" in batch:
            documents = batch["documents"]
            mask[:, :-depth] *= documents[:, depth:] == documents[:, :-depth]
        found[f"{KEY}{depth}"] = mask
    return found


class DepthMasks:
    """The masks of all depths, standing at one of them: what megatron-core takes for a loss mask."""

    def __init__(self, masks: Sequence[Tensor], weights: Sequence[float], depth: int = 0):
        """Take the mask [B, S] of each depth, and each depth's weight relative to the others (1 = as in the paper)."""
        self._masks, self._weights, self._depth = masks, weights, depth

    @classmethod
    def of(cls, batch: dict[str, Tensor], decay: float) -> DepthMasks | None:
        """Return the masks of a batch, each depth ``decay`` times the weight of the one before; None without MTP."""
        masks = [batch[f"{KEY}{depth}"] for depth in range(1, sum(key.startswith(KEY) for key in batch) + 1)]
        return cls(masks, [decay**depth for depth in range(len(masks))]) if masks else None

    def next_depth(self) -> tuple[DepthMasks, Tensor]:
        """Return the masks standing at the next depth, and what megatron-core divides a sum of losses by for its log:
        the depth's weight, so that the log holds the unweighted sum."""
        weight = self._weights[self._depth]
        return DepthMasks(self._masks, self._weights, self._depth + 1), self._masks[0].new_full((), weight or 1.0)

    def __mul__(self, losses: Tensor) -> Tensor:
        """Return the losses [B, S] of this depth that count, times its weight."""
        return self._masks[self._depth - 1] * self._weights[self._depth - 1] * losses
