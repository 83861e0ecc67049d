"""The run directory of all ranks: held by rank 0, made by it, and seen by every host before a model is built; and what
starts that failed have left in it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.failures.blame import Blame, take_blames
from dsv3_megatron.run.failures.records import forget, note_hosts, start_folder
from dsv3_megatron.run.lock import run_lock
from parallel.agree import agreed, gathered
from parallel.world import World, host_name


@contextmanager
def held_by_rank_0(directory: str | Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the run directory for as long as the block lasts. All ranks together.

    ``warn``: told, on rank 0, when a full disk leaves the run without a lock.
    Raises: RunInUseError: on all ranks.
    """
    is_first = dist.get_rank() == 0
    with ExitStack() as held:
        with agreed(looked=is_first):
            if is_first:
                held.enter_context(run_lock(directory, warn))
        yield


def create_for_all_hosts(directory: RunDirectory) -> None:
    """Make the run directory on rank 0, and let the first rank of every host write in it. All ranks together.

    Raises: RecipeError: the place cannot be written. RankFault: some hosts cannot write there, or see another folder of
    that name, as where a mount is missing.
    """
    is_first, is_first_of_host = dist.get_rank() == 0, World.from_environment().local_rank == 0
    token = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(token, src=0)  # a name that no host can have looked for before
    with agreed(looked=is_first):
        if is_first:
            directory.create()
            directory.leave_mark(token[0])
    with agreed(looked=is_first_of_host):
        if is_first_of_host:
            directory.check_mark(token[0])
    if is_first:
        directory.remove_mark(token[0])


def tell_failed_starts(directory: RunDirectory, tell: Callable[[Blame], None]) -> None:
    """Tell, on rank 0, who failed first in each start that has failed before this one, and forget it. All ranks
    together."""
    is_first = dist.get_rank() == 0
    with agreed(looked=is_first):
        for blame in take_blames(directory.path, but=start_folder(directory.path)) if is_first else ():
            tell(blame)


@contextmanager
def noted_start(directory: str | Path) -> Iterator[None]:
    """Note which host every rank is on for as long as the block lasts; after an error the note stays, beside what the
    ranks that have failed add to it (run/failures). All ranks together."""
    is_first, hosts, folder = dist.get_rank() == 0, gathered(host_name()), start_folder(directory)
    if is_first:
        with suppress(OSError):  # a full disk ends no run
            note_hosts(folder, hosts)
    yield
    if is_first:
        forget(folder)
