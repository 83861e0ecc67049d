"""Which kernel of Transformer Engine serves an attention on this machine, asked before anything is built.

TE chooses at the first forward, and where no fused kernel serves it takes one that forms all S x S scores and keeps
their probabilities for backward, without a word: 128 heads of 4,096 tokens keep 4 GiB a layer, and three times the time
(measured on an H200). Reasons vary: float32, a GPU that is too old, or a cuDNN that cannot load its own parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TOKENS = 128  # of the question; whether a fused kernel serves does not depend on them
_LOGGER = "DotProductAttention"  # TE's own name (2.9 to 2.20)
_REJECTED = "Disabling FusedAttention"


def why_unfused(heads: int, query_key: int, value: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why Transformer Engine would form all S x S scores, or None where a fused kernel serves.

    None also where TE no longer selects a kernel as it did in 2.9 to 2.20: its attention is its own affair then.

    Args:
        heads: on this rank. query_key, value: width of a head of queries and keys, and of values.
        dtype: of what is attended. device: of this rank.
    """
    import transformer_engine.pytorch as te  # an optional package

    layer = te.DotProductAttention(heads, (query_key, value), qkv_format="sbhd", attn_mask_type="causal").to(device)
    inputs = [
        torch.zeros(_TOKENS, 1, heads, width, dtype=dtype, device=device, requires_grad=True)
        for width in (query_key, query_key, value)
    ]
    flash = fused = True
    with _selection() as said:
        try:
            layer(*inputs)
        except _Selected as selected:
            flash, _, fused, *_ = selected.args
    if flash or fused:
        return None
    reasons = [line.removeprefix(_REJECTED).lstrip(": ").strip() for line in said if line.startswith(_REJECTED)]
    return " ".join(reasons[-1].split()) if reasons else "it does not say why"


class _Selected(Exception):
    """Carries what TE has selected out of its forward, before a kernel runs."""


@contextmanager
def _selection() -> Iterator[list[str]]:
    """Let TE's attention raise _Selected once it has selected a kernel; collect what it says meanwhile."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils  # likewise

    select, level = utils.get_attention_backend, utils.AttentionLogging._log_level

    def selected(*given: Any, **named: Any) -> None:
        raise _Selected(*select(*given, **named))

    logger, said = logging.getLogger(_LOGGER), _Said()
    state = logger.level, logger.propagate
    utils.get_attention_backend, utils.AttentionLogging._log_level = selected, logging.DEBUG
    logger.addHandler(said)
    logger.propagate = False  # what TE says at its most talkative is for this question alone
    try:
        yield said.lines
    finally:
        utils.get_attention_backend, utils.AttentionLogging._log_level = select, level
        logger.removeHandler(said)
        logger.level, logger.propagate = state


class _Said(logging.Handler):
    """Keeps the text of every message."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.lines.append(record.getMessage())
