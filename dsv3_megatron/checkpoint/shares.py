"""Which numbers of its stages' parameters a rank saves and reads: those whose optimizer states it holds.

The distributed optimizer (ZeRO-1) divides the parameters of a stage evenly among the ranks that hold it. A checkpoint
is divided the same way: of weights, masters, moments and average alike, each rank writes its own run of every
parameter and reads no other, so that nothing is gathered for a save, and weights are gathered over the fabric after a
load. What is frozen has no optimizer states: its numbers are cut as evenly, one parameter of a stage after the other.
Names, whole shapes and places of parameters are megatron-core's (``sharded_state_dict``); runs become boxes of those
(``boxes``), which any other layout can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from dsv3_megatron.checkpoint.boxes import Box, boxes_of_run, common_box, even_runs, strides_of
from dsv3_megatron.optim.optimizer import parts_of
from dsv3_megatron.pipeline.saved import Entry

# Numbers of a piece at most: what is read, verified and converted at a time, and what a rank of another layout reads
# too much of at its ends.
PIECE = 1 << 24


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor that lies in a run: where it is in the whole, and where in the run."""

    key: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, run: Tensor) -> Tensor:
        """Return the view of a run [numbers] that this piece is."""
        return run.as_strided(self.extent, self.strides, run.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class Share:
    """The run [start, end) of a parameter's numbers, row-major, that this rank saves and reads.

    Attributes:
        name: ``stageN.`` and the parameter's name in that stage.
        writes: whether this rank saves it; not where another pipeline or tensor rank saves the same.
        group: the ranks among which the parameter is divided.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    end: int
    pieces: tuple[Piece, ...]
    writes: bool = True
    group: dist.ProcessGroup | None = None

    def run_of(self, whole: Tensor) -> Tensor:
        """Return this run, as a view, of a tensor in the parameter's shape."""
        return whole.view(-1)[self.start : self.end]

    def numbers(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return this run of the parameter, without autograd: a view, or of a weight that Transformer Engine holds in
        FP8 a copy of the numbers that it stands for, in ``dtype`` (None: the one it computes in)."""
        weight = self.parameter.detach()
        if not is_float8tensor(weight):
            return self.run_of(weight)
        numbers = weight.dequantize(dtype=dtype)  # type: ignore[call-arg]  # Transformer Engine's
        return self.run_of(numbers.contiguous()).clone()  # not the whole weight with it

    def entries(self, run: Tensor, prefix: str = "") -> Iterator[Entry]:
        """Yield the boxes of a state of this run [end - start], named as the parameter after ``prefix``."""
        for piece in self.pieces:
            yield Entry(prefix + piece.key, piece.whole, piece.start, piece.of(run), self.writes)


def shares_of(chunks: dict[int, GPTModel], optimizer: MegatronOptimizer, groups: ProcessGroupCollection) -> list[Share]:
    """Return this rank's share, which may be empty, of every parameter of its stages; over all ranks they are whole."""
    return list(_shares(chunks, groups, dict([*_runs(optimizer), *_frozen_runs(chunks, groups)]).__getitem__))


def whole_shares(
    chunks: dict[int, GPTModel], groups: ProcessGroupCollection, wanted: Callable[[torch.nn.Parameter], bool]
) -> list[Share]:
    """Return the parameters of this rank's stages that are ``wanted``, each whole, as shares."""
    return list(_shares(chunks, groups, lambda p: ((0, p.numel()), None) if wanted(p) else None))


def _shares(
    chunks: dict[int, GPTModel],
    groups: ProcessGroupCollection,
    run_of: Callable[[torch.nn.Parameter], tuple[tuple[int, int], dist.ProcessGroup | None] | None],
) -> Iterator[Share]:
    """Yield a share of every parameter of which ``run_of`` says the run and the group, in the order of the stages."""
    described = {id(value.data): value for value in model_state(chunks, groups)}
    for stage, chunk in chunks.items():
        for name, parameter in chunk.named_parameters():
            if (found := run_of(parameter)) is not None:
                (start, end), group = found
                share = _share(described[id(parameter)], f"stage{stage}.{name}", parameter, start, end)
                yield replace(share, group=group)


def buffer_entries(chunks: dict[int, GPTModel], groups: ProcessGroupCollection, prefix: str = "") -> list[Entry]:
    """Return what stages hold beside parameters, on every rank alike: the biases of routers."""
    return [
        Entry(prefix + v.key, v.global_shape, v.global_offset, v.data, is_main_replica(v.replica_id), groups.dp_cp)
        for v in model_state(chunks, groups)
        if not isinstance(v.data, torch.nn.Parameter)
    ]


def model_state(chunks: dict[int, GPTModel], groups: ProcessGroupCollection) -> list[Any]:
    """Return what megatron-core says of every tensor of this rank's stages, but for Transformer Engine's own state."""
    # How megatron-core cuts: in the shapes of the model, which any layout can load.
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    return [
        value
        for chunk in chunks.values()
        for value in nested_values(_chunk_state(chunk, metadata))
        if isinstance(value, (ShardedTensor, ShardedTensorFactory))
    ]


def _chunk_state(chunk: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's sharded state. An embedding of another stage on this rank is saved with that one."""
    borrowed = chunk.mtp_process and "embedding" not in dict(chunk.named_children())
    chunk.mtp_process, before = chunk.mtp_process and not borrowed, chunk.mtp_process
    try:
        state = chunk.sharded_state_dict(metadata=metadata)
    finally:
        chunk.mtp_process = before
    return {name: value for name, value in state.items() if not is_te_state(name)}


def is_te_state(name: str) -> bool:
    """Return whether an entry of a module's state is Transformer Engine's pickled state, by its name."""
    return name.rpartition(".")[2].startswith("_extra_state")


def _runs(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, tuple[tuple[int, int], Any]]]:
    """Yield every parameter with the run of it that this rank updates, and the group it is divided among
    (megatron-core 0.16.1)."""
    for part in parts_of(optimizer):
        mine = {
            parameter: (ranges["param"].start, ranges["param"].end)
            for buffer in part.gbuf_ranges
            for buckets in buffer.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for parameter in (parameter for buffer in part.buffers for parameter in buffer.params):
            yield parameter, (mine.get(parameter, (0, 0)), part.data_parallel_group)


def _frozen_runs(
    chunks: dict[int, GPTModel], groups: ProcessGroupCollection
) -> Iterator[tuple[torch.nn.Parameter, tuple[tuple[int, int], dist.ProcessGroup]]]:
    """Yield every frozen parameter with the run of it that this rank saves and reads, and the group it is cut among."""
    for parameters, group in _frozen(chunks, groups):
        for parameter, runs in zip(parameters, even_runs([p.numel() for p in parameters], group.size())):
            yield parameter, (runs[group.rank()], group)


def _frozen(
    chunks: dict[int, GPTModel], groups: ProcessGroupCollection
) -> Iterator[tuple[list[torch.nn.Parameter], dist.ProcessGroup]]:
    """Yield the frozen parameters of every stage that the ranks of a group hold alike, and the group."""
    for chunk in chunks.values():
        frozen = [parameter for parameter in chunk.parameters() if not parameter.requires_grad]
        experts = [p for p in frozen if not getattr(p, "allreduce", True)]  # megatron-core's mark of them
        yield [p for p in frozen if getattr(p, "allreduce", True)], groups.dp_cp
        yield experts, groups.expt_dp


@torch.no_grad()
def gather_frozen(chunks: dict[int, GPTModel], groups: ProcessGroupCollection) -> None:
    """Give all ranks the frozen parameters whole, of which each has read its run. Collective."""
    for parameters, group in _frozen(chunks, groups):
        if group.size() == 1:
            continue
        for parameter, runs in zip(parameters, even_runs([p.numel() for p in parameters], group.size())):
            for owner, (start, end) in enumerate(runs):
                if start < end:
                    dist.broadcast(parameter.data.view(-1)[start:end], group=group, group_src=owner)


def _share(described: Any, name: str, parameter: torch.nn.Parameter, start: int, end: int) -> Share:
    """Return a run of a parameter as a share."""
    strides = strides_of(parameter.shape)
    boxes = list(boxes_of_run(parameter.shape, start, end, PIECE))
    pieces = [
        _piece(part, place, common, strides, start)
        for part, place in _parts_with_places(described, parameter, strides)
        for box in boxes
        if (common := common_box(box, place)) is not None
    ]
    assert sum(torch.Size(piece.extent).numel() for piece in pieces) == end - start, name
    return Share(name, parameter, start, end, tuple(pieces), writes=not any(described.replica_id[:-1]))


def _parts_with_places(
    described: Any, parameter: torch.nn.Parameter, strides: tuple[int, ...]
) -> list[tuple[ShardedTensor, Box]]:
    """Return the tensors that a parameter is in checkpoints, and which box of it each is: gate and up of SwiGLU are one
    parameter."""
    if not isinstance(described, ShardedTensorFactory):
        return [(described, Box((0,) * parameter.ndim, tuple(parameter.shape)))]
    stand_in = parameter.detach()
    if is_float8tensor(parameter):  # whose parts are no views
        stand_in = torch.empty(parameter.shape, dtype=torch.uint8, device=parameter.device)
    found = []
    for part in nested_values([replace(described, data=stand_in).build()]):
        assert part.data.stride() == strides or part.data.is_contiguous(), (part.data.stride(), strides)
        left, corner = int(part.data.storage_offset()) - int(stand_in.storage_offset()), []
        for stride in strides:
            corner.append(left // stride)
            left %= stride
        found.append((part, Box(tuple(corner), tuple(part.data.shape))))
    return found


def _piece(part: ShardedTensor, place: Box, box: Box, strides: tuple[int, ...], start: int) -> Piece:
    """Return a box of a parameter, which lies in tensor ``part`` of it, as a piece of the run that begins at
    ``start``. ``place``: the box that the part is."""
    axes = part.prepend_axis_num  # of the whole that the parameter itself does not have: the number of an expert
    inside = tuple(corner - first for corner, first in zip(box.start, place.start))
    corner = (*part.global_offset[:axes], *(a + b for a, b in zip(part.global_offset[axes:], inside)))
    offset = sum(a * b for a, b in zip(box.start, strides)) - start
    return Piece(part.key, part.global_shape, corner, (*(1,) * axes, *box.extent), (*(1,) * axes, *strides), offset)
