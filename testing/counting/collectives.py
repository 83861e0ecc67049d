"""Process groups and what goes over them: groups made, collectives by kind, their bytes, and which groups carry any.

Names in the tally: ``groups/called`` (calls of ``new_group``), ``groups/joined`` (those this rank is in),
``calls/KIND`` and ``bytes/KIND``. Bytes are those of the tensors that a rank gives in or those that it gets, whichever
are more. A kind is the function that was called: ``all_reduce``, ``all_gather_object``, ...; what an object's function
sends inside is counted as its bytes, not as calls of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from testing.counting.store import CountedStore
from testing.counting.tally import Tally

# Method of torch's ProcessGroup, to which every function of torch.distributed comes in the end -> kind.
METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "gather": "gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}
PAIRS = ", pairs"  # follows the description of a group whose ranks send to each other
OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")


class Used(Counter[tuple[str, int]]):
    """Messages of each group: (its description, its size) -> how many. Those between two of its ranks are apart."""


@contextmanager
def counted_collectives(tally: Tally) -> Iterator[Used]:
    """Count inside; the default process group must be made inside too."""
    used, inside = Used(), threading.local()
    real_init, real_new = dist.init_process_group, dist.new_group

    def init(*arguments: Any, store: dist.Store, **others: Any) -> None:
        real_init(*arguments, store=CountedStore(store, tally), **others)

    def new(*arguments: Any, **others: Any) -> Any:
        group = real_new(*arguments, **others)
        tally.add("groups/called")
        if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
            tally.add("groups/joined")
        return group

    def method(name: str, kind: str) -> Callable[..., Any]:
        real = getattr(dist.ProcessGroup, name)

        def call(group: dist.ProcessGroup, *arguments: Any, **others: Any) -> Any:
            of = getattr(inside, "object", None)
            if of is None:
                tally.add(f"calls/{kind}")
            tally.add(f"bytes/{of or kind}", max(map(tensor_bytes, (*arguments, *others.values())), default=0))
            used[group.group_desc + (PAIRS if kind in ("send", "recv") else ""), group.size()] += 1
            return real(group, *arguments, **others)

        return call

    def object_function(name: str) -> Callable[..., Any]:
        real = getattr(c10d, name)

        def call(*arguments: Any, **others: Any) -> Any:
            tally.add(f"calls/{name}")
            inside.object = name
            try:
                return real(*arguments, **others)
            finally:
                inside.object = None

        return call

    with ExitStack() as stack:
        for name, kind in METHODS.items():
            stack.enter_context(patch.object(dist.ProcessGroup, name, method(name, kind)))
        replaced = {"init_process_group": init, "new_group": new} | {name: object_function(name) for name in OBJECTS}
        for name, function in replaced.items():
            for module in (dist, c10d):
                stack.enter_context(patch.object(module, name, function))
        yield used


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a value of lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(map(tensor_bytes, value))
    assert not isinstance(value, Mapping), "no collective takes tensors by name"
    return 0
