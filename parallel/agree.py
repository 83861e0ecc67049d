"""What one rank cannot do ends all of them, with one reason: no rank waits for another that has left.

A mistake in a recipe is the same on every rank. What only some ranks meet is a fault of their hosts: a mount that is
missing, a disk that fails. Ranks tell the two apart by counting.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.errors import RankFault, UserError
from parallel.world import host_name

T = TypeVar("T")

MOST_HOSTS = 4  # that a message names; more are counted
MOST_CHARACTERS = 500  # of a message that others than this project have written


def agree(error: BaseException | None, *, looked: bool = True, any_counts: bool = False) -> None:
    """Raise on all ranks what any of them has met; return where none has met anything. All ranks call this together.

    A UserError that every rank has met is raised on all. Any other error is raised where it was met, and on the other
    ranks, in its place, a RankFault that names the first rank and its host. Takes one all-reduce of three numbers where
    no rank has an error. Needs the default process group.

    Args:
        error: what this rank has met.
        looked: whether this rank has looked at all: only those that have are counted.
        any_counts: a UserError of one rank is everybody's, for what only some ranks can see though the cause is common:
            a tensor that a checkpoint holds in another shape, on the pipeline rank that has it.
    Raises: UserError, RankFault, or ``error`` itself.
    """
    is_user = isinstance(error, UserError)
    users, failed, lookers = _sum(int(is_user), int(error is not None), int(looked))
    if not failed:
        return
    refused = bool(users) and (any_counts or users == lookers)
    verdict = _verdict(error if is_user or not refused else None, failed, lookers, refused)
    if error is not None and not refused and not is_user and isinstance(error, Exception):
        raise error
    raise verdict from (None if refused else error)


@contextmanager
def agreed(*, looked: bool = True, any_counts: bool = False) -> Iterator[None]:
    """Run the block on every rank, and end it on all as :func:`agree` says of what it has raised on any."""
    error: Exception | None = None
    try:
        yield
    except Exception as met:
        error = met
    agree(error, looked=looked, any_counts=any_counts)


def from_first(find_out: Callable[[], T]) -> T:
    """Return on all ranks what ``find_out`` returns on rank 0, which alone calls it. What it raises ends all ranks, as
    :func:`agree` says of the only rank that has looked. The result can be pickled."""
    is_first = dist.get_rank() == 0
    found: list[Any] = [None]
    with agreed(looked=is_first):
        if is_first:
            found = [find_out()]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gathered(mine: Any) -> list[Any]:
    """Return on rank 0 what every rank gives, by rank; nothing elsewhere. All ranks together; it can be pickled."""
    is_first = dist.get_rank() == 0
    found: list[Any] = [None] * dist.get_world_size() if is_first else []
    dist.gather_object(mine, found if is_first else None)
    return found


def _sum(*numbers: int) -> list[int]:
    total = torch.tensor(numbers)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def _verdict(error: BaseException | None, failed: int, lookers: int, refused: bool) -> Exception:
    """Return what all ranks raise, as the first rank with an ``error`` that counts says it."""
    size, rank = dist.get_world_size(), dist.get_rank()
    first = torch.tensor(size if error is None else rank)
    if size > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    speaker = int(first)
    hosts: list[str] = [""] * size if rank == speaker else []
    mine = host_name() if error is not None else ""
    if size > 1:
        dist.gather_object(mine, hosts if rank == speaker else None, dst=speaker)
    said: list[Exception | None] = [None]
    if rank == speaker:
        assert error is not None
        others, text = _others(hosts, mine), _line(error)
        few = "" if failed == lookers else ": no fault of the recipe"
        fault = RankFault(f"rank {rank} on {mine}{others}: {text} ({failed:,} of {lookers:,} ranks{few})")
        said = [error if refused and isinstance(error, UserError) else fault]
    if size > 1:
        dist.broadcast_object_list(said, src=speaker)
    assert said[0] is not None
    return said[0]


def _others(hosts: list[str], first: str) -> str:
    """Return " (and 7 more there, 8 on node-9)"; ``hosts``: of every rank that failed, "" of every other."""
    counted = Counter(host for host in hosts if host)
    there = counted.pop(first, 1) - 1
    parts = [f"{there:,} more there"] if there else []
    parts += [f"{count:,} on {host}" for host, count in list(counted.items())[: MOST_HOSTS - 1]]
    if more := list(counted.values())[MOST_HOSTS - 1 :]:
        parts.append(f"{sum(more):,} on {len(more):,} more host{'s' * (len(more) > 1)}")
    return f" (and {', '.join(parts)})" if parts else ""


def _line(error: BaseException) -> str:
    if isinstance(error, (UserError, RankFault)):
        return str(error)
    return " ".join("".join(traceback.format_exception_only(error)).split())[:MOST_CHARACTERS]
