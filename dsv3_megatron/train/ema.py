"""The exponential moving average of the weights, kept in host memory and updated beside training.

It foresees what the model would be after the learning rate has decayed, at no cost on the device: after an optimizer
step the new weights are averaged in by a thread, while the next step's passes run; that step waits for it only before
it changes the weights (arXiv 2412.19437 section 3.2.3; the decay is not published). Averaged are the weights that
forward reads, in float32. Of a parameter that several ranks hold, each averages the run that its optimizer updates
(checkpoint/shares.py): 0.33 billion numbers a rank for DeepSeek-V3 on 2,048. Router biases are no weights: an
evaluation of the average uses the current ones. Frozen weights are their own average, and are kept no second time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from dsv3_megatron.checkpoint.optimizer_states import gather_weights
from dsv3_megatron.checkpoint.shares import Share
from dsv3_megatron.pipeline.saved import Entry

PREFIX = "ema."


class Ema:
    """The average of this rank's share of the weights; also a named state of checkpoints."""

    def __init__(
        self,
        shares: Sequence[Share],
        decay: float,
        ddps: Iterable[DistributedDataParallel] = (),
        buffers: Sequence[Entry] = (),
    ):
        """Start from the weights as they are.

        Args:
            shares: this rank's, of which it averages those that are trained.
            decay: share of the old average that a step keeps, 0 to 1.
            ddps: the stages, which gather their weights from all ranks' shares.
            buffers: router biases, named as parts of the average: checkpoints hold them with it.
        """
        self.decay = decay
        self._shares = {share.name: share for share in shares if share.parameter.requires_grad}
        self._ddps, self._buffers = list(ddps), buffers
        mine = list(self._shares.values())
        self._stream = torch.cuda.Stream() if any(share.parameter.is_cuda for share in mine) else None
        self._host = {s.name: _host_buffer(s) for s in mine if s.parameter.is_cuda or is_float8tensor(s.parameter)}
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
            buffer.copy_(self._shares[name].numbers(torch.float32), non_blocking=True)

    def _update_or_fail(self) -> None:
        try:
            self._update()
        except BaseException as failure:  # an average that is no average must not be saved
            self._failure = failure

    @torch.no_grad()
    def _update(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        for name, share in self._shares.items():
            new = self._host[name] if name in self._host else share.numbers(torch.float32)
            self.average[name].lerp_(new.float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_into_weights(self) -> None:
        """Make the average the model's weights, in their dtype; weights held in FP8 are quantised anew. Collective."""
        self.wait()
        for name, share in self._shares.items():
            if is_float8tensor(share.parameter):
                self._quantise_anew(share)
            else:
                share.run_of(share.parameter.data).copy_(self.average[name])
        gather_weights(self._ddps)

    def _quantise_anew(self, share: Share) -> None:
        """Set a weight held in FP8 as a whole: the scale of a block depends on all of it."""
        weight = share.parameter
        numbers = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        share.run_of(numbers).copy_(self.average[share.name])
        if share.group is not None:
            dist.all_reduce(numbers, group=share.group)  # the others' runs are zero here
        weight.copy_(numbers.view(weight.shape))

    # -- a state of checkpoints (pipeline.parts.ExtraState) ----------------------------------------------------------

    def entries(self, *, but: AbstractSet[Tensor] = frozenset()) -> list[Entry]:
        """Return the average's boxes: those of the weights, under keys of its own. ``but``: not of these parameters."""
        self.wait()
        wanted = {name: share for name, share in self._shares.items() if share.parameter not in but}
        runs = [entry for name, share in wanted.items() for entry in share.entries(self.average[name], PREFIX)]
        return [*runs, *self._buffers]

    def loaded(self) -> None:
        """An average was filled in."""

    @torch.no_grad()
    def begin_anew(self, parameters: AbstractSet[Tensor] | None = None) -> None:
        """Start from the weights as they are: all of them, or those of ``parameters``."""
        self.wait()
        self.average |= {
            name: share.numbers(torch.float32).to("cpu", torch.float32, copy=True)
            for name, share in self._shares.items()
            if parameters is None or share.parameter in parameters
        }


def _host_buffer(share: Share) -> Tensor:
    """Return page-locked memory for a copy of a run, in float32 where the weight is held in FP8."""
    weight = share.parameter
    dtype = torch.float32 if is_float8tensor(weight) else weight.dtype
    return torch.empty(share.end - share.start, dtype=dtype, device="cpu", pin_memory=weight.is_cuda)
