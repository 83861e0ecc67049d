"""Self-speculation with the MTP modules: they draft the tokens after the next, the model checks all in one pass.

The text is the greedy text, token for token; what is saved is passes of the model. Depth k at position i sees the state
of depth k - 1 there and the embedding of token i + k, and predicts token i + k + 1 (arXiv 2412.19437 section 2.2 and
5.4.3, where the second token is accepted 85 to 90% of the time).

Legend: S sequence, B batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dsv3_megatron.pipeline.parts import Parts


@dataclass
class Speculation:
    """What drafting came to."""

    passes: int = 0  # of the main model
    drafted: int = 0
    accepted: int = 0


@torch.no_grad()
def main_states(module: GPTModel, tokens: Tensor) -> Tensor:
    """Return the states [S, B, H] that the output head reads, of tokens [B, S]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return module.decoder(hidden_states=module.embedding(tokens, positions), attention_mask=None)


@torch.no_grad()
def depth_states(module: GPTModel, depth: int, below: Tensor, ahead: Tensor) -> Tensor:
    """Return the states [S, B, H] of MTP depth ``depth`` (from 1).

    Args:
        below: the states of the depth below, or of the model for depth 1.
        ahead: [B, S] token i + depth for position i.
    """
    layer = module.mtp.layers[depth - 1]
    positions = torch.arange(ahead.shape[1], device=ahead.device).expand_as(ahead)
    embedded = module.embedding(ahead, positions)
    pair, _ = layer.eh_proj(torch.cat([layer.enorm(embedded), layer.hnorm(below)], dim=-1))
    return layer.final_layernorm(layer.transformer_layer(hidden_states=pair, attention_mask=None)[0])


def likeliest(module: GPTModel, states: Tensor) -> Tensor:
    """Return the likeliest tokens [B, S] of states [S, B, H]."""
    return module.output_layer(states)[0].argmax(-1).transpose(0, 1)


@torch.no_grad()
def speculate_tokens(
    parts: Parts, prompt: list[int], *, count: int, window: int, end: int | None, counts: Speculation
) -> Iterator[int]:
    """Yield the greedy continuation, as ``continue_tokens`` at temperature 0 does; counts what it did in ``counts``.

    Once the text is longer than ``window`` its oldest tokens are dropped one by one, and no two tokens are predicted
    from the same context: from there on nothing is drafted.
    """
    drafts: list[int] = []
    module, tokens, left = parts.whole_model, list(prompt), count
    module.eval()
    depths = len(module.mtp.layers) if module.mtp_process else 0
    while left > 0:
        context = (tokens + drafts)[-window:] if not drafts else tokens + drafts
        ids = torch.tensor([context], device=parts.device)
        states = main_states(module, ids)
        counts.passes += 1
        choices = likeliest(module, states[-1 - len(drafts) :])[0].tolist()
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
            accepted += 1
        counts.drafted, counts.accepted = counts.drafted + len(drafts), counts.accepted + accepted
        for token in choices[: accepted + 1][:left]:
            tokens.append(token)
            left -= 1
            yield token
            if token == end:
                return
        drafts = []
        if left > 1 and len(tokens) + depths <= window:
            # The states of what was accepted are those of the text; the last token, the model's own, has none yet.
            drafts = _draft(module, states[: len(tokens) - 1], tokens, min(depths, left - 1), parts.device)


def _draft(module: GPTModel, states: Tensor, tokens: list[int], depths: int, device: torch.device) -> list[int]:
    """Return one drafted token per depth after ``tokens``; ``states`` are those of all but the last of them."""
    drafts: list[int] = []
    for depth in range(1, depths + 1):
        ahead = torch.tensor([(tokens + drafts)[depth : depth + len(states)]], device=device)
        states = depth_states(module, depth, states, ahead)
        drafts.append(int(likeliest(module, states[-1:])[0, 0]))
    return drafts


@torch.no_grad()
def acceptance_rates(module: GPTModel, batches: list[dict[str, Tensor]], depths: int) -> list[float]:
    """Return, for every depth, how often its token is the model's own choice where all depths below it are right.

    Both read the text as it is: ``batches`` hold tokens, labels and loss_mask [B, S] of held-out text.
    """
    module.eval()
    hits, tries = torch.zeros(depths), torch.zeros(depths)
    for batch in batches:
        tokens, labels = batch["tokens"], batch["labels"]
        states = main_states(module, tokens)
        choices = likeliest(module, states)
        right = batch["loss_mask"].bool()
        for depth in range(1, depths + 1):
            known = tokens.shape[1] - depth  # positions whose token i + depth is in the text
            ahead = torch.cat([labels[:, depth - 1 :], labels[:, -1:].expand(-1, depth - 1)], dim=1)
            states = depth_states(module, depth, states, ahead)
            right = right[:, :known]
            tries[depth - 1] += right.sum()
            right = right & (likeliest(module, states)[:, :known] == choices[:, depth:])
            hits[depth - 1] += right.sum()
    return (hits / tries.clamp(min=1)).tolist()
