"""A world of any size in one process: every group exists, no message is sent. For planning and for shape tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from parallel.groups import stop_processes


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Be rank ``rank`` of ``size`` inside: collectives return at once and leave outputs of the right shape.

    Their numbers mean nothing, so only shapes, dtypes and memory may be read. Uses torch's fake process group, the one
    its own tests run on.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a private module, for plans alone

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        stop_processes()
