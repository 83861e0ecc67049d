"""One fork server for each set of preloaded modules: multiprocessing has one in all.

Processes that need Transformer Engine are forked from a server that has it; all others must not have it.
"""

from __future__ import annotations

import multiprocessing.popen_forkserver as popen
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.forkserver import ForkServer

_servers: dict[str, ForkServer] = {}


@contextmanager
def forked_from(preload: str) -> Iterator[None]:
    """Let processes started inside come from the server that has imported the module ``preload``.

    Where a process is started, multiprocessing asks its module-level server (Python 3.11 to 3.14); can go when a
    context takes a server.
    """
    if preload not in _servers:
        _servers[preload] = ForkServer()
        _servers[preload].set_forkserver_preload([preload])
    before = popen.forkserver
    popen.forkserver = types.SimpleNamespace(
        **vars(before) | {"connect_to_new_process": _servers[preload].connect_to_new_process}
    )
    try:
        yield
    finally:
        popen.forkserver = before


def servers() -> list[ForkServer]:
    """Return the servers that have been started."""
    return list(_servers.values())
