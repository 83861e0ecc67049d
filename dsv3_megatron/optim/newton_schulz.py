"""Newton-Schulz: the nearest matrix whose singular values are all near one, by products alone.

Every step maps each singular value s to a s + b s^3 + c s^5. With the published coefficients five steps bring all that
are not tiny to between 0.7 and 1.2, which serves as well as exactly one (Keller Jordan,
https://kellerjordan.github.io/posts/muon; ``torch.optim.Muon`` computes the same, one matrix at a time).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7  # floor of the norm that a matrix is divided by: one of zeros stays one of zeros
# Numbers iterated on together on a CPU, whose caches hold them from the first product to the last: 1 MiB in float32.
CACHED = 1 << 18


def orthogonalise(stack: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Return [B, n, m] with U V^T, nearly, for every matrix U S V^T [n, m] of ``stack``, in its dtype.

    ``stack`` [B, n, m] may be overwritten. Matrices are iterated on with their shorter side first, where products are
    smaller.
    """
    together = max(1, CACHED // (stack.shape[-2] * stack.shape[-1]))
    if stack.device.type != "cpu" or len(stack) <= together:
        return _iterate(stack, steps, coefficients)
    for part in stack.split(together):
        part.copy_(_iterate(part, steps, coefficients))
    return stack


def _iterate(stack: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """All steps on a whole stack."""
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=EPSILON))
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x.mT if tall else x
