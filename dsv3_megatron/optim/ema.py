"""The exponential moving average of the weights, kept in host memory and updated beside training.

It foresees what the model would be after the learning rate has decayed, at no cost on the device: after an optimizer
step the new weights are averaged in by a thread, while the next step's passes run; that step waits for it only before
it changes the weights (arXiv 2412.19437 section 3.2.3; the decay is not published). Averaged are the weights that
forward reads, in float32, one copy of what this rank's stages hold. Router biases are no weights: an evaluation of the
average uses the current ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

PREFIX = "ema."


class Ema:
    """The average of the weights of this rank's stages; also a named state of checkpoints."""

    def __init__(self, chunks: dict[int, torch.nn.Module], decay: float, groups: ProcessGroupCollection | None):
        """Start from the weights as they are.

        Args:
            chunks: this rank's stages.
            decay: share of the old average that a step keeps, 0 to 1.
            groups: who holds what, for checkpoints; None where none is written.
        """
        self.decay, self._groups = decay, groups
        self._chunks = chunks
        self._weights = {f"stage{s}.{n}": p for s, chunk in chunks.items() for n, p in chunk.named_parameters()}
        on_device = next(iter(self._weights.values())).is_cuda
        self._stream = torch.cuda.Stream() if on_device else None
        self._host = (
            {n: torch.empty_like(p, device="cpu").pin_memory() for n, p in self._weights.items()} if on_device else {}
        )
        self.average: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied: torch.cuda.Event | None = None
        self.begin_anew()

    def start(self) -> None:
        """Begin to average in the weights as they are after this step. They must not change before :meth:`wait`."""
        self.wait()
        if self._stream is not None:  # the copy waits for the optimizer, the next optimizer step for the copy
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for name, weight in self._weights.items():
                    self._host[name].copy_(weight.detach(), non_blocking=True)
            self._copied = self._stream.record_event()
        self._thread = threading.Thread(target=self._update, name="ema", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the weights may change again and the average is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _update(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        for name, weight in self._weights.items():
            new = self._host[name] if self._host else weight.detach()
            self.average[name].lerp_(new.float(), 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model's parameters be the average for as long as the block lasts."""
        self.wait()
        before = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self.average[name]
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = before[name]

    @torch.no_grad()
    def copy_into_weights(self) -> None:
        """Make the average the model's weights, in their dtype."""
        self.wait()
        for name, weight in self._weights.items():
            weight.copy_(self.average[name])

    # -- a state of checkpoints (checkpoint.state.ExtraState) ----------------------------------------------------------

    def sharded_state(self, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Return the average as megatron-core's sharded state: cut as the model is, under keys of its own."""
        from dsv3_megatron.checkpoint.state import model_state

        with self.in_place():
            state = dict_list_map_inplace(_own_data, model_state(self._chunks, self._groups))
        add_prefix_for_sharding(state, PREFIX)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over an average that was saved."""
        with self.in_place():
            for stage, chunk in self._chunks.items():
                biases = {n: b.clone() for n, b in chunk.named_buffers() if n.endswith("expert_bias")}
                chunk.load_state_dict(state[f"stage{stage}"])
                for name, bias in biases.items():
                    chunk.get_buffer(name).copy_(bias)

    def begin_anew(self) -> None:
        """Start from the weights as they are."""
        self.wait()
        self.average = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._weights.items()}


def _own_data(part: Any) -> Any:
    """Let a piece of sharded state refer to the data that a parameter has now, not to the parameter."""
    if isinstance(getattr(part, "data", None), Tensor):
        part.data = part.data.detach()
    return part
