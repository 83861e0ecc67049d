"""Filling a rank from a checkpoint, whatever layout wrote it.

Every rank reads the boxes of its own share (``shares``), once, and compares each piece with its checksum; what it needs
beside them it gets from the ranks that have read it. What any rank meets ends all of them together: another model, a
damaged piece, a fault of a host.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.index import index_of
from dsv3_megatron.checkpoint.optimizer_states import (
    MASTER,
    gather_weights,
    prepare_moments,
    set_updates,
    states_of,
    weights_from_masters,
)
from dsv3_megatron.checkpoint.read import misfit, read_entries
from dsv3_megatron.checkpoint.shares import Share, buffer_entries, shares_of, whole_shares
from dsv3_megatron.checkpoint.state import optimizer_entries, weight_entries
from dsv3_megatron.checkpoint.write import COMMON
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.run.files import retried
from parallel.agree import agreed, from_first
from parallel.errors import CheckpointError


def load_checkpoint(found: Found, parts: Parts, *, training: bool, extra: tuple[str, ...] = ()) -> list[str]:
    """Fill this rank's stages from a checkpoint written in any layout; return what a person should know. All ranks
    together.

    ``training``: optimizer and all extra states too. ``extra``: extra states to fill besides.
    Raises: CheckpointError: the checkpoint is of another model. DamageError: it is not what was written. RankFault:
    some rank could not load it for a reason of its own; that rank raises the reason.
    """
    if training:
        extra = tuple(sorted(set(found.extra) & set(parts.extra_states)))
    if parts.ema is not None:
        parts.ema.wait()  # it may still read the weights of the last step
    with agreed():
        shares = shares_of(parts.chunks, parts.optimizer, parts.groups)
        held = {} if training else _held_in_fp8(parts)
        entries = _masters(found, parts, shares) if training else _weights(shares, held)
        entries += buffer_entries(parts.chunks, parts.groups)
        entries += [entry for name in extra for entry in parts.extra_states[name].entries()]
    index = index_of(found.path, {entry.key for entry in entries})
    with agreed(any_counts=True):
        if reason := misfit(index, entries):
            raise CheckpointError(
                f"{found.path} does not fit this model ({reason}); use the recipe it was trained with"
            )
    _fill(found, index, entries)
    if training:
        set_updates(parts.optimizer, _updates(found))
        weights_from_masters(parts.optimizer, parts.ddps.values())
    else:
        gather_weights(parts.ddps.values())
        with torch.no_grad():
            for share, numbers in held.items():
                share.parameter.copy_(numbers.view(share.parameter.shape))
    for name in extra:
        parts.extra_states[name].loaded()
    return _begin_others(found, parts, extra) if training else []


def _masters(found: Found, parts: Parts, shares: Sequence[Share]) -> list[Entry]:
    """Return what fills the optimizer; weights follow from its masters.

    A checkpoint without its states has weights with which masters begin: not with what FP8 has left of them.
    """
    prepare_moments(parts.optimizer)
    if found.optimizer:
        return optimizer_entries(parts, shares)
    states = states_of(parts.optimizer)
    for each in states.values():
        for name, state in each.items():
            if name != MASTER:
                state.zero_()
    mine = [share for share in shares if share.parameter in states]
    return weight_entries(mine, lambda share: states[share.parameter][MASTER])


def _held_in_fp8(parts: Parts) -> dict[Share, Tensor]:
    """Return memory for the numbers of weights held in FP8, which cannot be filled run by run."""
    shares = whole_shares(parts.chunks, parts.groups, is_float8tensor)
    return {share: torch.empty(share.end, dtype=torch.bfloat16) for share in shares}


def _weights(shares: Sequence[Share], held: dict[Share, Tensor]) -> list[Entry]:
    """Return what fills the weights that forward reads, but for those held in FP8 their runs of this rank."""
    runs = [share for share in shares if not is_float8tensor(share.parameter)]
    entries = weight_entries(runs, lambda share: share.run_of(share.parameter.data))
    return entries + weight_entries(held, lambda share: held[share])


def _updates(found: Found) -> int:
    """Return how often the optimizer had updated the weights. Collective."""
    if found.updates is not None or not found.optimizer:
        return found.updates or 0
    return from_first(lambda: _updates_in_format_1(found.path / COMMON))


def _updates_in_format_1(common: Path) -> int:
    """Return them from the file of what is no tensor."""
    data = io.BytesIO(retried(common.read_bytes))
    return max(_steps(torch.load(data, weights_only=False)["optimizer"]), default=0)


def _steps(state: Any) -> Iterable[int]:
    """Yield the values of all keys "step" in nested dictionaries and lists."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if key == "step":
            yield int(value)
        elif isinstance(value, (dict, list)):
            yield from _steps(value)


def _fill(found: Found, index: Metadata, entries: Sequence[Entry]) -> None:
    """Read what this rank is to read, and give or take what ranks hold alike. Collective."""
    mine = [entry for entry in entries if entry.group is None or entry.group.rank() == 0]
    with agreed(any_counts=True):
        read_entries(found.path, index, mine, checked=found.checked)
    for entry in entries:
        if entry.group is not None and entry.group.size() > 1:
            numbers = entry.tensor.contiguous()
            dist.broadcast(numbers, group=entry.group, group_src=0)
            entry.tensor.copy_(numbers)


def _begin_others(found: Found, parts: Parts, extra: tuple[str, ...]) -> list[str]:
    """Let the extra states begin that the checkpoint does not hold; return what a person should know."""
    notes = []
    for name in sorted(set(parts.extra_states) - set(extra)):
        parts.extra_states[name].begin_anew()
        notes.append(f"{found.path} holds no {name}: it begins anew from the weights loaded")
    if left := sorted(set(found.extra) - set(parts.extra_states)):
        notes.append(f"{found.path} also holds {', '.join(left)}, which this recipe does not keep: not loaded")
    return notes
