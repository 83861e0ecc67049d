"""Filling a rank from a checkpoint, whatever layout wrote it.

Every rank reads the boxes of its own share (``shares``), once, and compares each piece with its checksum; what it needs
beside them it gets from the ranks that have read it. What any rank meets ends all of them together: another model, a
damaged piece, a fault of a host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.checkpoint.index import index_of
from dsv3_megatron.checkpoint.manifest import USE_OLDER, DamageError, damage_of
from dsv3_megatron.checkpoint.optimizer_states import (
    MASTER,
    forget_moments,
    gather_weights,
    moment_entries,
    other_moments,
    prepare_moments,
    set_updates,
    states_of,
    updated_by_another,
    weights_from_masters,
)
from dsv3_megatron.checkpoint.read import misfit, read_entries
from dsv3_megatron.checkpoint.shares import Share, buffer_entries, gather_frozen, shares_of, whole_shares
from dsv3_megatron.checkpoint.state import optimizer_entries, weight_entries
from dsv3_megatron.checkpoint.stored.saved_tensor import read_description
from dsv3_megatron.checkpoint.write import COMMON
from dsv3_megatron.model.freeze import is_frozen
from dsv3_megatron.model.initialise import global_name
from dsv3_megatron.optim.adamw import longest_late_step
from dsv3_megatron.optim.muon import MOMENTUM
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.run.files import retried
from dsv3_megatron.run.handed import read_bytes
from parallel.agree import agreed, from_first
from parallel.errors import CheckpointError

_States = dict[Share, dict[str, Tensor]]  # of every share, by name


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
        thawed = set(_thawed(found, parts))
        states = _states(parts, shares) if training else {}
        kept = {share: each for share, each in states.items() if found.optimizer and share.parameter not in thawed}
        entries = _masters(parts, shares, states, kept) if training else _weights(shares, held)
        entries += buffer_entries(parts.chunks, parts.groups)
        entries += [entry for name in extra for entry in _entries_of(parts, name, but=thawed)]
    index = found.index or index_of(found.path, {entry.key for entry in entries} | other_moments(kept))
    with agreed(any_counts=True):
        changed = updated_by_another(index, kept)
        forgotten = {entry.key for share in changed for entry in moment_entries(share, kept[share])}
        entries = [entry for entry in entries if entry.key not in forgotten]
        for share in changed:
            forget_moments(kept[share])
        if reason := misfit(index, [entry for entry in entries if entry.is_read_here]):
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
    gather_frozen(parts.chunks, parts.groups)
    for name in extra:
        parts.extra_states[name].loaded()
    if parts.ema is not None and thawed:
        parts.ema.begin_anew(thawed)
    if not training:
        return []
    notes = [*_changed_freeze(found, parts), *_begin_others(found, parts, extra)]
    return [*notes, *_changed_optimizer(found, parts, {share: kept[share] for share in changed})]


def _thawed(found: Found, parts: Parts) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that are trained, and were frozen in the checkpoint."""
    for stage, chunk in parts.chunks.items():
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and is_frozen(found.freeze, global_name(name, parts.first_layer(stage))):
                yield parameter


def _entries_of(parts: Parts, name: str, *, but: AbstractSet[Tensor]) -> Iterable[Entry]:
    """Return what fills an extra state; an average of parameters that were frozen is not there."""
    if parts.ema is not None and parts.extra_states[name] is parts.ema:
        return parts.ema.entries(but=but)
    return parts.extra_states[name].entries()


def _states(parts: Parts, shares: Sequence[Share]) -> _States:
    """Return the optimizer's states of this rank's shares, but for those that are frozen or empty."""
    prepare_moments(parts.optimizer)
    states = states_of(parts.optimizer)
    return {share: states[share.parameter] for share in shares if share.parameter in states}


def _masters(parts: Parts, shares: Sequence[Share], states: _States, kept: _States) -> list[Entry]:
    """Return what fills the optimizer, from whose masters weights follow, and the weights that are frozen.

    Of what a checkpoint holds no states of, which is not in ``kept`` - all, if it has weights alone; what was frozen in
    it - masters begin with its weights (not with what FP8 has left of them), and moments with zeros.
    """
    anew = [share for share in states if share not in kept]
    frozen = [share for share in shares if not share.parameter.requires_grad]
    for share in anew:
        forget_moments(states[share])
    return [
        *optimizer_entries(parts, kept),
        *weight_entries(anew, lambda share: states[share][MASTER]),
        *weight_entries(frozen, lambda share: share.run_of(share.parameter.data)),
    ]


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
    """Return them from the file of what is no tensor. Raises: DamageError: it says something else."""
    try:
        with damage_of(common):
            data = retried(lambda: read_bytes(common))
        found, _ = read_description(memoryview(data))
        return max(_steps(found["optimizer"]), default=0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = error if isinstance(error, ValueError) else "it does not say how often weights were updated"
        raise DamageError(f"{common} cannot be read ({said}); {USE_OLDER}") from None


def _steps(state: Any) -> Iterable[int]:
    """Yield the values of all keys "step" in nested dictionaries and lists. Raises: ValueError: one is no number."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if key == "step":
            if type(value) not in (int, float) or not 0 <= value < 1 << 48:
                raise ValueError("it does not say how often weights were updated")
            yield int(value)
        elif isinstance(value, (dict, list)):
            yield from _steps(value)


def _fill(found: Found, index: Metadata, entries: Sequence[Entry]) -> None:
    """Read what this rank is to read, and give or take what ranks hold alike. Collective."""
    mine = [entry for entry in entries if entry.is_read_here]
    with agreed(any_counts=True):
        read_entries(found.path, index, mine, checked=found.checked)
    for entry in entries:
        if entry.group is not None and entry.group.size() > 1:
            numbers = entry.tensor.contiguous()
            dist.broadcast(numbers, group=entry.group, group_src=0)
            entry.tensor.copy_(numbers)


def _changed_freeze(found: Found, parts: Parts) -> list[str]:
    """Return what a person should know of a run that trains other parts than the checkpoint's."""
    model, then = parts.recipe.model, found.freeze
    if then == model.freeze:
        return []
    sizes = {key: prod(shape) for key, shape in our_shapes(model).items() if not key.endswith("expert_bias")}
    before = {key for key in sizes if is_frozen(then, key)}
    after = {key for key in sizes if is_frozen(model.freeze, key)}
    notes = []
    if count := sum(sizes[key] for key in before - after):
        notes.append(
            f"{count:,} parameters that were frozen in {found.path} (model.freeze = {list(then)}) are trained from "
            f"here on: their moments begin with zeros{_late_steps(found, parts)}"
        )
    if found.optimizer and (count := sum(sizes[key] for key in after - before)):
        notes.append(
            f"{count:,} parameters that were trained in {found.path} are frozen from here on (model.freeze = "
            f"{list(model.freeze)}): their moments are not loaded, nor an average of them"
        )
    return notes


def _changed_optimizer(found: Found, parts: Parts, changed: _States) -> list[str]:
    """Return what a person should know of parameters that another optimizer has updated before. Collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for share, states in changed.items():
        counts[int(MOMENTUM in states)] += (share.end - share.start) * share.writes
    counts = counts.to(parts.device)
    dist.all_reduce(counts)
    by_adamw, by_muon = counts.tolist()
    notes = []
    if by_muon:
        notes.append(
            f"{by_muon:,} parameters that AdamW has updated in {found.path} are updated by Muon from here on: their "
            "momentum begins with zeros"
        )
    if by_adamw:
        notes.append(
            f"{by_adamw:,} parameters that Muon has updated in {found.path} are updated by AdamW from here on: their "
            f"moments begin with zeros{_late_steps(found, parts)}"
        )
    return notes


def _late_steps(found: Found, parts: Parts) -> str:
    """Return how long AdamW's steps are of moments that begin with zeros now, where that is longer than usual."""
    stretch = longest_late_step(parts.recipe.optim.betas, found.updates or 0)
    return f", and their first steps are up to {stretch:.1f} times as long as Adam's" if stretch > 1.5 else ""


def _begin_others(found: Found, parts: Parts, extra: tuple[str, ...]) -> list[str]:
    """Let the extra states begin that the checkpoint does not hold; return what a person should know."""
    notes = []
    for name in sorted(set(parts.extra_states) - set(extra)):
        parts.extra_states[name].begin_anew()
        notes.append(f"{found.path} holds no {name}: it begins anew from the weights loaded")
    if left := sorted(set(found.extra) - set(parts.extra_states)):
        notes.append(f"{found.path} also holds {', '.join(left)}, which this recipe does not keep: not loaded")
    return notes
