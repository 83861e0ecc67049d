"""What a checkpoint holds of a rank: weights and router biases, the optimizer's states, named extra states.

There is one format: the names, shapes and formats of the torch backend (``hugging_face.our_shapes``). A stage on
Transformer Engine gives its tensors those names itself (``model.specs.NAMES_IN_CHECKPOINTS``); the optimizer's states
and the average of the weights take theirs from it. Weights that TE holds in FP8 are stored as the numbers that they
stand for, and TE's pickled ``_extra_state`` is not stored at all: what of it has numbers, delayed scaling's amaxes, is
an extra state (``te_amaxes``). Moments are stored in the dtype in which they are held.

Generators of random numbers are not stored: nothing draws from them after the first weights (there is no dropout).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from dsv3_megatron.checkpoint.manifest import OPTIMIZER, WEIGHTS
from dsv3_megatron.checkpoint.optimizer_states import entry_prefix, prepare_moments, states_of
from dsv3_megatron.checkpoint.shares import Share, buffer_entries
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.saved import Entry


def states_to_save(parts: Parts, shares: Iterable[Share]) -> dict[str, list[Entry]]:
    """Return this rank's share of everything, by what the files that keep it hold.

    Numbers of weights held in FP8 are copies, all else is the state itself. Those are exact where scales are powers of
    two. Where they are not, a run that resumes loses nothing either: it quantises its float32 masters anew.
    """
    prepare_moments(parts.optimizer)
    return {
        WEIGHTS: [*weight_entries(shares, Share.numbers), *buffer_entries(parts.chunks, parts.groups)],
        OPTIMIZER: optimizer_entries(parts, shares),
        **{name: list(state.entries()) for name, state in sorted(parts.extra_states.items())},
    }


def weight_entries(shares: Iterable[Share], run_of: Callable[[Share], Tensor]) -> list[Entry]:
    """Return the entries of weights; ``run_of`` says which memory [numbers of the run] holds those of a share."""
    return [entry for share in shares for entry in share.entries(run_of(share))]


def optimizer_entries(parts: Parts, shares: Iterable[Share]) -> list[Entry]:
    """Return the entries of masters and moments."""
    states = states_of(parts.optimizer)
    return [
        entry
        for share in shares
        for name, state in states.get(share.parameter, {}).items()
        for entry in share.entries(state, prefix=entry_prefix(name))
    ]
