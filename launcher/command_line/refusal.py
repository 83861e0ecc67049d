"""Whether starting again cannot help: all ranks of a start refuse, and the batch job is told so.

What only some ranks refuse - data that one host has not mounted - is a fault of their hosts, and a new start may go
well. So ranks vote, in the store by which they meet, before or after they have met. A vote that is not complete, or a
store that does not answer, is no refusal: the batch script bounds how often it starts a job again.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import RunInUseError, UserError
from parallel.world import World

if TYPE_CHECKING:
    from torch.distributed import Store

REFUSED_FILE = "DSV3_REFUSED_FILE"  # environment variable, set by the batch script
VOTE_SECONDS = 60.0  # in which ranks that make the same mistake come to it, on hosts that import at different speeds

LOOK_SECONDS = 0.2  # between two looks at the store
HEARD_SECONDS = 5.0  # in which a rank that waits has looked


def refusal_file(error: BaseException) -> Path | None:
    """Return the file in which a batch job wants to be told of an error, None where nobody asks, or it may try again.

    A run directory in use is no refusal: its owner may be a rank that died on another host a minute ago.
    """
    file = os.environ.get(REFUSED_FILE)
    return Path(file) if file and isinstance(error, UserError) and not isinstance(error, RunInUseError) else None


def write_refusal(file: Path, error: BaseException) -> None:
    """Tell the batch job; what stands there already is kept."""
    with suppress(OSError), file.open("x") as word:
        word.write(f"{error}\n")


class Vote(threading.Thread):
    """This rank's vote that the recipe be refused. Counted beside whatever the rank still has to say.

    Attributes:
        is_over: whether the outcome is known.
        unanimous: whether every rank refuses; the last one to vote has written the file.
    """

    def __init__(self, file: Path, error: BaseException, seconds: float = VOTE_SECONDS):
        """Vote for ``error``. ``seconds``: how long to wait for the other ranks' votes."""
        super().__init__(name="vote", daemon=True)
        self._file, self._error, self._seconds = file, error, seconds
        self.is_over = self.unanimous = False
        self.start()

    def run(self) -> None:
        """Vote, and wait for the outcome."""
        try:
            self.unanimous = self._vote()
        finally:
            self.is_over = True

    def _vote(self) -> bool:
        # torch: seconds, which no rank waits for before it has spoken
        import torch.distributed as dist

        from parallel.groups import JOINED  # as above
        from parallel.meeting import open_store
        from parallel.pipeline.watchdog import process_group_store

        deadline, world = time.monotonic() + self._seconds, World.from_environment()
        with suppress(RuntimeError):  # what torch raises of a store that does not answer, and of a rank that is gone
            joined = dist.is_initialized()  # then all ranks have, and each is asked for its vote
            # Kept for as long as the process lives: it may be the store of all ranks.
            self._store = store = process_group_store() if joined else open_store(world, self._seconds)
            if store.add("refusals", 1) == world.size:
                write_refusal(self._file, self._error)
                store.set("refused", "")
            while time.monotonic() < deadline:
                if store.check(["refused"]):
                    self._let_all_hear(store, world)
                    return True
                if not joined and store.check([JOINED]):
                    return False
                time.sleep(LOOK_SECONDS)
        return False

    def _let_all_hear(self, store: Store, world: World) -> None:
        """Hold rank 0 until the others know the outcome: the store may be its."""
        heard, deadline = store.add("heard", 1), time.monotonic() + HEARD_SECONDS
        while world.rank == 0 and heard < world.size and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            heard = store.add("heard", 0)
