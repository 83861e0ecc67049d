"""What megatron-core needs over Transformer Engine: beside host.py, for the te backend alone.

Each entry: why, for which versions, and how one sees that it can go. All were seen with megatron-core 0.16.1 over
TE 2.20.2, on TE's own Python (testing/te).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_adapted = False

# megatron-core is imported inside the functions: not before the process is prepared, and only where it is adapted.


def adapt_te() -> None:
    """Make megatron-core right over Transformer Engine, which must be importable. Idempotent."""
    global _adapted
    if not _adapted:
        _adapted = True
        _save_layers_without_fp8_state()
        _recompute_mtp_by_position()


def _save_layers_without_fp8_state() -> None:
    """Why: TE's extra state is empty but for delayed scaling, and megatron-core's grouped layers look into it when they
    are saved ("'NoneType' object is not subscriptable"): every checkpoint of an FP8 run fails. Can go when
    test_a_resumed_run_is_the_run_that_was_not_stopped passes without it."""
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    split = TEGroupedLinear._split_extra_state

    @functools.wraps(split)
    def split_extra_state(self: Any, state: Any) -> list:
        return [state] * self.num_gemms if state.numel() == 0 else split(self, state)

    TEGroupedLinear._split_extra_state = split_extra_state


def _recompute_mtp_by_position() -> None:
    """Why: under FP8 an MTP layer is recomputed by TE's checkpoint, which hands gradients to positional tensors only,
    and megatron-core gives it all by keyword: the MTP modules, and what they send into the model, get none, and no
    error says so. Can go when test_no_recomputation_changes_a_gradient passes without it."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer as Layer

    checkpointed = Layer._checkpointed_forward

    @functools.wraps(checkpointed)
    def checkpointed_forward(self: Any, forward: Callable, *given: Any, **named: Any) -> Any:
        def by_position(*values: Any) -> Any:
            return forward(*values[: len(given)], **dict(zip(named, values[len(given) :])))

        return checkpointed(self, by_position, *given, *named.values())

    Layer._checkpointed_forward = checkpointed_forward
