"""Text from a trained model, one token after another, in one process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv3_megatron.model.stage import forward_logits
from dsv3_megatron.pipeline.parts import Parts


def continue_tokens(
    parts: Parts,
    prompt: list[int],
    *,
    count: int,
    temperature: float,
    seed: int,
    window: int,
    end: int | None,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Yield up to ``count`` tokens after ``prompt``.

    Args:
        parts: a whole model (all stages in one).
        temperature: 0.0 takes the likeliest token; above, sampling with a generator of its own.
        window: tokens of context the model was trained with; older ones are dropped.
        end: stop after this token, if given.
        top_p: sample from the likeliest tokens that together have this much of the probability.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    tokens = list(prompt)
    for _ in range(count):
        context = torch.tensor([tokens[-window:]], device=parts.device)
        logits = forward_logits(parts.whole_model, context)[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = nucleus((logits / temperature).softmax(-1).cpu().numpy(), top_p)
            token = int(random.choice(len(chances), p=chances))
        tokens.append(token)
        yield token
        if token == end:
            return


def nucleus(chances: np.ndarray, top_p: float) -> np.ndarray:
    """Return probabilities [V] with all but the likeliest set to zero: as few as together reach ``top_p``, one at least
    (arXiv 1904.09751)."""
    order = np.argsort(-chances, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    kept = np.zeros_like(chances)
    chosen = order[before < top_p]
    kept[chosen] = chances[chosen]
    return kept / kept.sum()
