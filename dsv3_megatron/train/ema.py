"""The exponential moving average of the weights, kept in host memory and updated beside training.

It foresees what the model would be after the learning rate has decayed, at no cost on the device: after an optimizer
step the new weights are averaged in by a thread, while the next step's passes run; that step waits for it only before
it changes the weights (arXiv 2412.19437 section 3.2.3; the decay is not published). Averaged are the weights that
forward reads, in float32, one copy of what this rank's stages hold. Router biases are no weights: an evaluation of the
average uses the current ones.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsv3_megatron.checkpoint.state import model_state

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
        self._stream = torch.cuda.Stream() if next(iter(self._weights.values())).is_cuda else None
        self._host = {n: _host_buffer(p) for n, p in self._weights.items() if p.is_cuda or is_float8tensor(p)}
        self.average: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copied: torch.cuda.Event | None = None
        self.begin_anew()

    def start(self) -> None:
        """Begin to average in the weights as they are after this step. They must not change before :meth:`wait`."""
        self.wait()
        if self._stream is None:
            self._copy_to_host()
        else:  # the copy waits for the optimizer, the next optimizer step for the copy
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy_to_host()
            self._copied = self._stream.record_event()
        self._thread = threading.Thread(target=self._update_or_fail, name="ema", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the weights may change again and the average is whole. Raises what went wrong in the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @torch.no_grad()
    def _copy_to_host(self) -> None:
        for name, buffer in self._host.items():
            buffer.copy_(_readable(self._weights[name]), non_blocking=True)

    def _update_or_fail(self) -> None:
        try:
            self._update()
        except BaseException as failure:  # an average that is no average must not be saved
            self._failure = failure

    @torch.no_grad()
    def _update(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        for name, weight in self._weights.items():
            new = self._host[name] if name in self._host else weight.detach()
            self.average[name].lerp_(new.float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_into_weights(self) -> None:
        """Make the average the model's weights, in their dtype; weights held in FP8 are quantised anew."""
        self.wait()
        for name, weight in self._weights.items():
            weight.copy_(self.average[name].to(weight.device))

    # -- a state of checkpoints (pipeline.parts.ExtraState) ----------------------------------------------------------

    def sharded_state(self, metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Return the average as megatron-core's sharded state: cut as the model is, under keys of its own.

        The pieces are the model's with the average in the place of their data; the model itself is left alone. (A
        parameter whose ``.data`` is exchanged for a tensor of another dtype or device, and back, has lost its gradient
        accumulator, and with it the hooks through which DDP gathers its gradient.)
        """

        self.wait()
        missing = {id(weight): self.average[name] for name, weight in self._weights.items()}

        def averaged(part: Any) -> Any:
            if isinstance(part, ShardedTensorFactory) and id(part.data) in missing:
                return replace(part, data=missing.pop(id(part.data)))
            if isinstance(part, ShardedTensor) and id(part.data) in missing:
                average = missing.pop(id(part.data))
                return replace(part, data=average, dtype=average.dtype)
            if isinstance(part, ShardedTensor):  # a router's bias: loading fills a copy, not the bias in use
                return replace(part, data=part.data.detach().clone())
            return part

        state = dict_list_map_inplace(averaged, model_state(self._chunks, self._groups))
        assert not missing, f"{len(missing)} weights are no whole tensors of the model's sharded state"
        add_prefix_for_sharding(state, PREFIX)
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over an average that was saved. Router biases stay as they are."""
        self.wait()
        for stage, chunk in self._chunks.items():
            for name, _ in chunk.named_parameters():
                self.average[f"stage{stage}.{name}"].copy_(state[f"stage{stage}"][name])

    def begin_anew(self) -> None:
        """Start from the weights as they are."""
        self.wait()
        self.average = {
            n: _readable(p).to("cpu", torch.float32, copy=True).contiguous() for n, p in self._weights.items()
        }


def _readable(weight: Tensor) -> Tensor:
    """Return a weight without autograd; one that Transformer Engine holds in FP8 as the numbers it stands for."""
    if is_float8tensor(weight):
        return weight.dequantize(dtype=torch.float32).detach()  # type: ignore[call-arg]  # Transformer Engine's
    return weight.detach()


def _host_buffer(weight: Tensor) -> Tensor:
    """Return page-locked memory for a copy of a weight, in float32 where the weight is held in FP8."""
    dtype = torch.float32 if is_float8tensor(weight) else weight.dtype
    return torch.empty(weight.shape, dtype=dtype, device="cpu", pin_memory=weight.is_cuda)
